"""Rows without an experiment."""

import csv
import gzip
import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.infer_format import holds_rows, spec_of_rows
from orchestrator.data.preview import preview
from orchestrator.errors import DataError
from orchestrator.spec.sections import COLUMNS_OF, BaseSection, DataSection


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", COLUMNS_OF)
def test_the_format_follows_from_the_columns(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / "rows.jsonl", {"id": 1} | dict.fromkeys(COLUMNS_OF[name], "a"))
    spec = spec_of_rows(file, ["data.max_length=64"])
    assert (spec.data.format, spec.data.source, spec.data.max_length) == (name, str(file), 64)
    assert spec.base.model == "embedded"


def test_a_given_format_is_used(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", {"text": "a", "q": "b"})
    spec = spec_of_rows(file, ["data.format=template", 'data.template="{q} {text}"', "base.model=owner/name"])
    assert (spec.data.format, spec.data.template, spec.base.model) == ("template", "{q} {text}", "owner/name")


def followed(file: Path, *given: str) -> DataSection:
    """Return the data section of a file after the printed remedy has been typed into a shell."""
    with pytest.raises(DataError) as caught:
        spec_of_rows(file, list(given))
    words = shlex.split(caught.value.remedy)
    overrides = [word for before, word in pairwise(words) if before == "--set"]
    assert overrides
    return spec_of_rows(file, [*given, *overrides]).data


@pytest.mark.parametrize(
    ("columns", "template"),
    [
        (["q", "a"], "{q} {a}"),
        (["Question Text", 'It\'s "it"'], '{Question Text} {It\'s "it"}'),
        (["", "Q: text", "$a `b`"], "{Q: text} {$a `b`}"),
        (["What is it?", "a\\b"], "{What is it??} {a\\b}"),
    ],
)
def test_the_remedy_for_other_columns_works(tmp_path: Path, columns: list[str], template: str) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, ["1"] * len(columns), ["2"] * len(columns)])
    data = followed(tmp_path / "rows.csv")
    assert data.template == template
    assert len(preview(data, BaseSection(model="embedded"), 0).lengths) == 1, "and its rows are read"


def test_columns_that_are_not_text_are_not_in_the_remedy(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", {"q": "1", "meta": {"a": 1}, "a": "2"})
    assert followed(file).template == "{q} {a}"
    with pytest.raises(DataError, match="Format template reads named columns of text"):
        spec_of_rows(written(tmp_path / "none.jsonl", {"meta": {"a": 1}}), [])


@pytest.mark.parametrize(("delimiter", "name"), [(";", "rows.csv"), ("\t", "rows.csv"), ("|", "rows.csv.gz")])
def test_the_remedy_for_another_delimiter_works(tmp_path: Path, delimiter: str, name: str) -> None:
    text = f"instruction{delimiter}output\n1{delimiter}2\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    data = followed(tmp_path / name)
    assert (data.delimiter, data.format) == (delimiter, "alpaca")


def test_turns_in_two_columns_are_messages(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "1"}]
    assert spec_of_rows(written(tmp_path / "rows.jsonl", {"prompt": turn, "completion": turn}), []).data.format == (
        "messages"
    )


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no row"):
        spec_of_rows(written(tmp_path / "rows.jsonl"), [])


def test_paths_that_hold_rows(tmp_path: Path) -> None:
    files = {
        "rows.jsonl": "", "rows.csv": "", "rows.parquet": "", "array.json": "[{}]", "lines.json": "{}\n{}\n",
        "rows.TXT": "", "rows.tsv": "", "rows.jsonl.gz": "", "object.json": '{"data": [{"a": 1}], "base": "x"}',
        "one.json": '{"messages": []}', "x.yaml": "base: {}", "x.json": '{"base": {}}', "y.json": '{"data": {"a": 1}}',
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert {name for name in files if not holds_rows(tmp_path / name)} == {"x.yaml", "x.json", "y.json"}
    assert holds_rows(tmp_path)
    assert not holds_rows(tmp_path / "nope.yaml")
