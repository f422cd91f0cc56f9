import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RequestError
from orchestrator.record.start import choose_folder
from orchestrator.spec import parse_spec


def test_the_option_counts_before_the_experiment_and_both_before_the_default(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = parse_spec(document)
    named = parse_spec(document | {"output": {"folder": "mine", "name": "one"}})
    assert choose_folder(named, "x.yaml", "two", "yours").root == tmp_path / "yours" / "two"
    assert choose_folder(named, "x.yaml", None, None).root == tmp_path / "mine" / "one"
    root = choose_folder(plain, "some/x.y.yaml", None, None).root
    assert root.parent == tmp_path / "runs"
    assert re.fullmatch(r"x\.y-\d{4}-\d{6}", root.name)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_folder_that_is_there_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(document)
    (tmp_path / "one").mkdir()
    with pytest.raises(RequestError, match=r"one: already exists\n.*resume"):
        choose_folder(spec, "x.yaml", "one", str(tmp_path))
    with pytest.raises(RequestError, match="must be a folder, not a URI"):
        choose_folder(spec, "x.yaml", "one", "s3://bucket/runs")


def test_a_file_in_the_way_is_told(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is not a folder that can be written to"):
        choose_folder(parse_spec(document), "x.yaml", "one", str(tmp_path / "file" / "runs"))
