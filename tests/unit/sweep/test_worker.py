"""The start of a worker, before it trains."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.spec import parse_spec
from orchestrator.sweep.workers import worker as worker_module
from orchestrator.sweep.workers.worker import Worker
from orchestrator.sweep.workers.worker_client import Workers


class Fetched(Exception):
    """Raised when the rows are fetched."""


def test_a_workers_rows_come_after_its_imports(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would fetch a reference that is an argument at once, and import for it beside the importing thread."""
    imported, order = threading.Event(), []

    def imports() -> None:
        assert imported.wait(60)
        order.append("imports")

    def fetch(reference: Any) -> Any:
        order.append(reference)
        raise Fetched

    monkeypatch.setattr(worker_module, "_import_libraries", imports)
    monkeypatch.setattr(worker_module.ray, "get_gpu_ids", list)
    monkeypatch.setattr(worker_module.ray, "get", fetch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    worker = Worker(parse_spec(document), slots=1, is_fixed=True, gpus=0)

    def open_(data: Any, logs: str) -> None:
        assert not any(value is rows for value in (data, logs)), "Ray would fetch this argument by itself"
        threading.Timer(0.2, imported.set).start()
        with pytest.raises(Fetched):
            worker.open(data, logs)

    rows = object()
    handle = SimpleNamespace(open=SimpleNamespace(remote=open_))
    Workers([handle], [], rows, tmp_path).open(handle)
    assert order == ["imports", [rows]]
