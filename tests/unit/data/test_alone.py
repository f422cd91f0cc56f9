"""Rows without an experiment."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.alone import holds_rows, spec_of_rows
from orchestrator.errors import DataError
from orchestrator.spec.sections import COLUMNS_OF


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", COLUMNS_OF)
def test_a_format_is_told_by_its_columns(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / "rows.jsonl", {"id": 1} | dict.fromkeys(COLUMNS_OF[name], "a"))
    spec = spec_of_rows(file, ["data.max_length=64"])
    assert (spec.data.format, spec.data.source, spec.data.max_length) == (name, str(file), 64)
    assert spec.base.model == "embedded"


def test_what_is_given_is_taken(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", {"text": "a", "q": "b"})
    spec = spec_of_rows(file, ["data.format=template", 'data.template="{q} {text}"', "base.model=owner/name"])
    assert (spec.data.format, spec.data.template, spec.base.model) == ("template", "{q} {text}", "owner/name")


def test_the_remedy_for_other_columns_works(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", {"q": "a", "a": "b"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: columns 'q', 'a' are those of no format") as caught:
        spec_of_rows(file, [])
    told = caught.value.remedy.rstrip(".").split("--set ")[1:]
    assert spec_of_rows(file, [override.strip(" '") for override in told]).data.template == "{q} {a}"


def test_a_file_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no row"):
        spec_of_rows(written(tmp_path / "rows.jsonl"), [])


def test_what_holds_rows(tmp_path: Path) -> None:
    files = {
        "rows.jsonl": "", "rows.csv": "", "rows.parquet": "", "array.json": "[{}]", "lines.json": "{}\n{}\n",
        "x.yaml": "base: {}", "x.json": '{"base": {}}',
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert {name for name in files if not holds_rows(tmp_path / name)} == {"x.yaml", "x.json"}
    assert holds_rows(tmp_path)
    assert not holds_rows(tmp_path / "nope.yaml")
