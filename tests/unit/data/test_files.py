"""Every kind of file, folder, glob and saved data set, with the place of each row."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from orchestrator.data.files import data_files, read_local
from orchestrator.errors import DataError

ROWS = [{"a": "x,\n1", "b": "007"}, {"a": "ä", "b": "NA"}, {"a": "", "b": "3"}]


def _jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def _jsonl_bytes() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _csv(path: Path) -> None:
    path.write_bytes('\ufeffa,b\r\n"x,\n1",007\r\nä,NA\r\n\r\n,3\r\n'.encode())


def _saved(path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(path)


KINDS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "rows.jsonl": (_jsonl, [":1", ":2", ":3"]),
    "array.json": (lambda path: _text(path, json.dumps(ROWS, indent=1)), [":2 row 0", ":6 row 1", ":10 row 2"]),
    "one-line.json": (lambda path: _text(path, json.dumps(ROWS)), [":1 row 0", ":1 row 1", ":1 row 2"]),
    "lines.json": (_jsonl, [":1", ":2", ":3"]),
    "rows.csv": (_csv, [":2", ":4", ":6"]),
    "ROWS.JSONL": (_jsonl, [":1", ":2", ":3"]),
    "rows.ndjson": (_jsonl, [":1", ":2", ":3"]),
    "rows.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(_jsonl_bytes())) and None, [":1", ":2", ":3"]),
    "rows.jsonl.BZ2": (lambda path: path.write_bytes(bz2.compress(_jsonl_bytes())) and None, [":1", ":2", ":3"]),
    "array.json.xz": (
        lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())) and None,
        [":1 row 0", ":1 row 1", ":1 row 2"],
    ),
    "object.json": (
        lambda path: _text(path, json.dumps({"version": "1", "data": ROWS})),
        [" data[0]", " data[1]", " data[2]"],
    ),
    "pretty.json": (
        lambda path: _text(path, json.dumps({"rows": ROWS, "n": [1]}, indent=1)),
        [" rows[0]", " rows[1]", " rows[2]"],
    ),
    "rows.tsv": (lambda path: _text(path, 'a\tb\n"x,\n1"\t007\nä\tNA\n\t3\n'), [":2", ":4", ":5"]),
    "rows.csv.gz": (
        lambda path: path.write_bytes(gzip.compress('a,b\n"x,\n1",007\nä,NA\n,3\n'.encode())) and None,
        [":2", ":4", ":5"],
    ),
    "rows.parquet": (lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path), [" row 0", " row 1", " row 2"]),
    "saved": (_saved, [" row 0", " row 1", " row 2"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_row_is_as_it_was_written_and_knows_its_place(tmp_path: Path, name: str) -> None:
    write, places = KINDS[name]
    write(tmp_path / name)
    rows = list(read_local(tmp_path / name, None))
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{tmp_path / name}{place}" for place in places]


def test_a_line_of_text_is_a_row(tmp_path: Path) -> None:
    _text(tmp_path / "rows.txt", "\ufeff one \r\n\n \ntwo\n")
    rows = list(read_local(tmp_path / "rows.txt"))
    assert [(row.values, row.where) for row in rows] == [
        ({"text": " one "}, f"{tmp_path / 'rows.txt'}:1"),
        ({"text": "two"}, f"{tmp_path / 'rows.txt'}:4"),
    ]


def test_text_files_beside_other_files_of_a_folder_are_ignored(tmp_path: Path) -> None:
    _text(tmp_path / "README.txt", "read me")
    assert [file.name for file in data_files(tmp_path)] == ["README.txt"]
    _jsonl(tmp_path / "rows.jsonl")
    assert [file.name for file in data_files(tmp_path)] == ["rows.jsonl"]


def test_another_delimiter(tmp_path: Path) -> None:
    _text(tmp_path / "rows.csv", 'a;b\n"1;2";3,4\n')
    assert [row.values for row in read_local(tmp_path / "rows.csv", delimiter=";")] == [{"a": "1;2", "b": "3,4"}]


def test_one_object_with_turns_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "1"}], "tools": [{"type": "function"}]}
    _text(tmp_path / "row.json", json.dumps(row))
    assert [each.values for each in read_local(tmp_path / "row.json")] == [row]
    lines = [{"turns": [{"a": 1}]}, {"turns": [{"a": 2}]}]
    _text(tmp_path / "lines.json", "".join(json.dumps(each) + "\n" for each in lines))
    assert [each.values for each in read_local(tmp_path / "lines.json")] == lines


def test_a_column_twice_in_a_table_is_refused(tmp_path: Path) -> None:
    table = pa.table([["1"], ["2"]], names=["a", "a"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: column 'a' appears twice"):
        list(read_local(tmp_path / "rows.parquet"))
    inner = pa.StructArray.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["b", "b"])
    pq.write_table(pa.table({"a": inner}), tmp_path / "nested.parquet")
    with pytest.raises(DataError, match=r"nested\.parquet: is not Parquet: .*duplicate field names"):
        list(read_local(tmp_path / "nested.parquet"))


def test_a_folder_and_a_glob_are_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "deep/c.jsonl", ".hidden/d.jsonl", ".e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (_csv if name.endswith("csv") else _jsonl)(tmp_path / name)
    (tmp_path / "README.md").write_text("no rows")

    def found(pattern: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in data_files(tmp_path / pattern)]

    assert found(".") == ["a.csv", "b.jsonl", "deep/c.jsonl"]
    assert found("*.jsonl") == ["b.jsonl"]
    assert found("**/*.jsonl") == ["b.jsonl", "deep/c.jsonl"]
    assert found("[ab].*") == ["a.csv", "b.jsonl"]
    assert found("**/**/c.jsonl") == ["deep/c.jsonl"], "once, however often it matches"
    assert len(list(read_local(tmp_path, None))) == 9


def test_a_split_of_a_saved_data_set(tmp_path: Path) -> None:
    parts = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert [row.where for row in read_local(tmp_path / "saved", "test")] == [f"{tmp_path / 'saved'}[test] row 0"]
    with pytest.raises(DataError, match=r"saved: has no split 'dev'; splits: train, test"):
        list(read_local(tmp_path / "saved", "dev"))
    assert len(list(read_local(tmp_path / "saved"))) == 3, "train, where none is asked for"
    assert len(list(read_local(tmp_path / "saved", default="test"))) == 1


def test_a_split_of_a_source_without_splits_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    _jsonl(tmp_path / "folder" / "rows.jsonl")
    for name in ("saved", "folder"):
        assert len(list(read_local(tmp_path / name, default="test"))) == 3
        with pytest.raises(DataError, match=rf"{name}: has no splits, but split dev is requested"):
            list(read_local(tmp_path / name, "dev"))


def test_nulls_that_a_table_fills_in_are_not_arguments(tmp_path: Path) -> None:
    """A table gives two calls with different arguments one type, in which each has the other's arguments as null."""
    calls = [[{"name": "f", "arguments": {"a": 1}}], [{"name": "f", "arguments": {"b": 2}}]]
    pq.write_table(pa.Table.from_pylist([{"calls": each, "none": None} for each in calls]), tmp_path / "rows.parquet")
    rows = [row.values for row in read_local(tmp_path / "rows.parquet", None)]
    assert rows == [{"calls": each, "none": None} for each in calls]


def test_a_file_is_not_read_further_than_requested(tmp_path: Path) -> None:
    for name, text in {
        "a.csv": "a\n1\n2,3\n",
        "a.json": '[{"a": 1}, nonsense',
        "a.jsonl": '{"a": 1}\nnonsense',
    }.items():
        (tmp_path / name).write_text(text)
        rows = read_local(tmp_path / name, None)
        assert str(next(rows).values["a"]) == "1"
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            next(rows)


WRONG: list[tuple[str, str | bytes, str]] = [
    ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: has 1 field, but the header has 2: a, b"),
    ("a.csv", 'a,b\n"1\n1",2\n3,4,5\n', r"a\.csv:4: has 3 fields"),
    ("a.csv", "a,a\n1,2\n", r"a\.csv:1: column 'a' appears twice"),
    ("a.csv", 'a\n1\n"2\n', r"a\.csv:3: is not CSV: unexpected end of data"),
    ("a.csv", b"a\nb\n\xff\n", r"a\.csv:3: is not UTF-8 text"),
    ("a.csv", "a\nb\n".encode("utf-16"), r"a\.csv:1: is not UTF-8 text"),
    ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json:2 row 1: is not JSON: Expecting ':' delimiter \(line 2, column 7\)"),
    ("a.json", '[{"a": 1},\n 2]', r"a\.json:2 row 1: must be a JSON object, got 2"),
    ("a.json", '[{"a": 1}\n {"a": 2}]', r"a\.json:1 row 0: is not JSON: after this row comes neither a comma nor"),
    ("a.json", '[{"a": 1}', r"a\.json:1 row 0: is not JSON: after this row comes neither a comma nor"),
    ("a.json", '[{"a": 1}]\n[]', r"a\.json:1: is not JSON: the array is followed by"),
    ("a.json", '[{"a": 1},\n]', r"a\.json:2: is not JSON: the array ends with a comma"),
    ("a.json", '{\n "data": [1]\n}', r"a\.json: holds one object without a list of rows\n.*object per line"),
    ("a.json", '{\n "x": [{"a": 1}], "y": [{"a": 1}]\n}', r"a\.json: holds one object without a list of rows"),
    ("a.json", '{\n "a": 1,\n "a": 2\n}', r"a\.json: key 'a' appears twice in one object"),
    ("a.json", '[{"a": 1},\n {"b": {"c": 1, "c": 2}}]', r"a\.json:2 row 1: key 'c' appears twice in one object"),
    ("a.json", '[{"a": 1,}]', r"a\.json:1 row 0: is not JSON: a comma comes before the closing } \(column 1\d\)"),
    ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"a\.jsonl:2: key 'a' appears twice in one object"),
    ("a.jsonl", '{"a": 1},\n{"a": 2}\n', r"a\.jsonl:1: is not JSON: a comma follows the object; .* \(column 9\)"),
    ("a.jsonl", '{"a": [1, 2,]}\n', r"a\.jsonl:1: is not JSON: a comma comes before the closing \]"),
    ("a.jsonl.gz", '{"a": 1}\n', r"a\.jsonl\.gz: is not compressed as its extension says"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:-9], r"a\.jsonl\.gz: cannot be read: Compressed file ended"),
    ("a.jsonl.bz2", '{"a": 1}\n', r"a\.jsonl\.bz2: cannot be read: Invalid data stream"),
    ("a.jsonl.xz", '{"a": 1}\n', r"a\.jsonl\.xz: is not compressed as its extension says"),
    ("a.parquet.gz", "text", r"a\.parquet\.gz: is of no known kind"),
    ("a.json", '{\n "a": 1\n', r"a\.json:1: is not JSON"),
    (
        "a.json",
        '{\n "a": 1\n}\n{\n "a": 2\n}\n',
        r"a\.json:1: is not JSON.*\n.*is an array of objects, .*or one object per line",
    ),
    ("a.json", '[{"a": 1}]'.encode("utf-16"), r"a\.json:1: is not UTF-8 text\n  Save the file as UTF-8"),
    ("a.json", b'[{"a": 1},\n{"a": "\xe4"}]', r"a\.json:2: is not UTF-8 text"),
    ("a.json", f'[{{"a": {"[" * 99_999}', r"a\.json:1 row 0: cannot be read: maximum recursion depth exceeded"),
    ("a.jsonl", '{"a": 1}\n{"a": 1\n', r"a\.jsonl:2: is not JSON: Expecting ',' delimiter \(column 8\)"),
    ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), r"a\.jsonl:1: is not UTF-8 text"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe4"}\n', r"a\.jsonl:2: is not UTF-8 text"),
    ("a.jsonl", '[{"a": 1}]', r"a\.jsonl:1: must be a JSON object, got \[.*\n.*an array of rows is a \.json file"),
    ("a.jsonl", '{"a": 1}\nnull\n', r"a\.jsonl:2: must be a JSON object, got null"),
    ("a.jsonl", '{"a": 1, "b": ["\\ud83d"]}\n', r"a\.jsonl:1: column 'b' holds half a character"),
    ("a.parquet", "no table", r"a\.parquet: is not Parquet"),
    (
        "a.md",
        "text",
        r"a\.md: is of no known kind; use one of \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.txt, \.parquet; all but",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    _text(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        list(read_local(tmp_path / name, None))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nope.csv", "nope.csv: there is no such data file"),
        ("empty", "empty: the folder contains no data file"),
        ("*.csv", r"\*\.csv: no file matches"),
        ("*", r"\*: matches x.md, which is of no known kind"),
        ("half", "half: the saved data set cannot be read"),
    ],
)
def test_a_path_without_rows(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "state.json").write_text("{}")
    (tmp_path / "x.md").write_text("")
    with pytest.raises(DataError, match=message):
        list(read_local(tmp_path / path, None))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that can be opened but not read")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # can be opened but not read, by any user
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|is not Parquet)"):
        list(read_local(tmp_path / name, None))


def _text(path: Path, content: Any) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
