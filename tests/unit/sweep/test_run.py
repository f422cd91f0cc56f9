"""How a sweep ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SweepError
from orchestrator.record import BudgetSpent, read_sweep, write_record
from orchestrator.sweep.run import _conclude


def test_a_budget_that_is_spent_before_a_trial_begins(tmp_path: Path, make_sweep: Callable[..., Any]) -> None:
    paths = make_sweep(tmp_path / "s", {})
    write_record(paths.budget, BudgetSpent(limit="wall_clock_hours", allowed=0.001, spent=0.002))
    with pytest.raises(SweepError, match="the budget was spent before a trial began"):
        _conclude(read_sweep(paths.root))
