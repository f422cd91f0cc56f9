"""Lines that several commands print."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cli import frame
from orchestrator.cli.frame import now_and_then, say_rows
from orchestrator.record import BadRows, SweepRecord, read_sweep, write_record
from tests.unit.conftest import MakeSweep


def test_rows_are_counted_against_their_total(tmp_path: Path, make_sweep: MakeSweep) -> None:
    """There are 20 rows: 4 are bad, 11 of the others are too long, 5 of those are dropped; 9 train, 2 are held out."""
    paths = make_sweep(tmp_path / "s", {})
    info = read_sweep(paths.root).info.model_copy(
        update={
            "num_train": 9, "num_held_out": 2, "num_truncated": 11, "num_dropped": 5, "num_shared": 1,
            "bad_rows": [BadRows(fault="column 'a' is empty", num_rows=4, first=["x:1", "x:2", "x:3"])],
        }
    )  # fmt: skip
    write_record(paths.sweep, info)
    record: SweepRecord = read_sweep(paths.root)
    out = StringIO()
    say_rows(Console(file=out, width=80), record)
    assert out.getvalue().splitlines() == [
        "note: 4 of 20 rows do not fit data.format and were left out",
        "  column 'a' is empty: 4 rows: x:1, x:2, x:3 and 1 more",
        "note: 11 of 16 rows were truncated to data.max_length=512 tokens (right)",
        "note: 5 of 16 rows had no token in the loss after truncation and were left out",
        "note: 1 of 2 held-out rows are also training rows; their loss says little about new data",
    ]


def test_progress_is_limited_to_one_line_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.9, 2.1, 3.0, 4.2])
    monkeypatch.setattr(frame.time, "monotonic", lambda: next(times))
    said: list[str] = []
    say = now_and_then(said.append)
    for line in "abcde":
        say(line)
    assert said == ["c", "e"]
