from pathlib import Path

import pytest

from orchestrator.data.sources import read_rows
from orchestrator.errors import DataError
from orchestrator.spec.sections import Source


def test_each_row_knows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa4"}\n{"a": 3}')
    rows = read_rows(Source(source=str(file)))
    assert [row.values["a"] for row in rows] == [1, "ä", 3]
    assert [row.where for row in rows] == [f"{file}:{line}" for line in (1, 4, 5)]


def test_rows_after_max_rows_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\nnonsense\n')
    assert len(read_rows(Source(source=str(file), max_rows=2))) == 2
    with pytest.raises(DataError, match=r"rows\.jsonl:3: is not JSON"):
        read_rows(Source(source=str(file), max_rows=3))


def test_the_embedded_rows() -> None:
    rows = read_rows(Source(source="embedded", max_rows=5))
    assert [row.where for row in rows] == [f"embedded:{i}" for i in (1, 2, 3, 4, 5)]
    assert all(set(row.values) == {"question", "answer"} for row in rows)
