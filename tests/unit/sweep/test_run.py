"""The start and the end of a sweep."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import SweepError
from orchestrator.record import BudgetSpent, SweepPaths, read_sweep, write_record
from orchestrator.spec import parse_spec
from orchestrator.sweep import run
from orchestrator.sweep.conclusion import conclude


def test_a_budget_that_is_spent_before_a_trial_starts(tmp_path: Path, make_sweep: Callable[..., Any]) -> None:
    paths = make_sweep(tmp_path / "s", {})
    write_record(paths.budget, BudgetSpent(limit="wall_clock_hours", allowed=0.001, spent=0.002))
    with pytest.raises(SweepError, match="the budget was spent before a trial finished"):
        conclude(read_sweep(paths.root), paths)


class Begun(Exception):
    """Raised when the rows are requested."""


def test_libraries_are_imported_while_ray_starts_and_before_the_rows_are_made(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def note(name: str, value: Any = None) -> Callable[..., Any]:
        return lambda *_: (order.append(name), value)[1]

    def start_sweep(*_: Any, **__: Any) -> None:
        order.append("rows")
        raise Begun

    monkeypatch.setattr(run, "begin", note("begin", SimpleNamespace(join=note("join"))))
    monkeypatch.setattr(run, "connection", note("ray", nullcontext()))
    monkeypatch.setattr(run, "start_fleet", note("workers", nullcontext()))
    monkeypatch.setattr(run, "require_shared_folder", note("folder"))
    monkeypatch.setattr(run, "start_sweep", start_sweep)
    with pytest.raises(Begun):
        run.run_sweep(parse_spec(document), SweepPaths(tmp_path / "sweep"), lambda _: None)
    assert order == ["begin", "ray", "workers", "folder", "join", "rows"]
