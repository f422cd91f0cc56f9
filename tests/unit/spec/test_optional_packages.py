import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import app
from orchestrator.errors import RequestError
from orchestrator.record import read_sweep
from orchestrator.spec.optional_packages import require_package


def test_an_installed_package_is_not_imported() -> None:
    require_package("this", "a poem", "poems")
    assert "this" not in sys.modules


def test_a_missing_package_is_named_with_its_install_command() -> None:
    with pytest.raises(RequestError, match="metric mauve needs the package no_such_package") as caught:
        require_package("no_such_package", "metric mauve", "metrics")
    assert caught.value.remedy == "pip install 'qlora-orchestrator[metrics]'"


def test_a_sweep_can_be_read_without_the_extra_but_resumed_only_with_it(
    document: dict[str, Any], make_sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document["tracking"] = {"mlflow": True}
    paths = make_sweep(tmp_path / "first", {"a": ("RUNNING", 0.5)})
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if the extra were not installed
    assert read_sweep(str(paths.root)).info.spec.tracking.mlflow
    with pytest.raises(RequestError, match=r"tracking.mlflow needs the package mlflow"):
        app(["resume", str(paths.root)], standalone_mode=False)
