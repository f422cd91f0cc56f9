"""The live view of a running sweep."""

import io
import os
import pty
import sys
from typing import Any

import pytest
from rich.console import Console

from orchestrator.record import TrialResult, TrialState
from orchestrator.report.live import SweepView
from orchestrator.report.tables import say_failures
from orchestrator.report.trial_view import TrialView
from orchestrator.spec import parse_spec
from tests.unit.report.made_up import made_up_spec

ERROR = "train/loss is nan at step 1\n  Try a lower learning rate, or another precision."
LINE = "b FAILED at step 0 (diverged): train/loss is nan at step 1; Try a lower learning rate, or another precision."


@pytest.fixture
def trials(document: dict[str, Any]) -> list[TrialResult]:
    """A trial that trains, and one that failed before its first report."""
    shared: dict[str, Any] = {"config": parse_spec(document).trial_config({}), "metric": "eval/loss", "mode": "min"}
    return [
        TrialResult(trial_id="a", state=TrialState.RUNNING, step=3, **shared),
        TrialResult(trial_id="b", state=TrialState.FAILED, error=ERROR, failure="diverged", **shared),
    ]


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
def test_a_trial_that_fails_at_step_0_is_shown_once_with_the_reason(
    is_terminal: bool, trials: list[TrialResult]
) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=160, color_system=None)
    with SweepView(console, made_up_spec(), lambda: 2, "sweep of 2 trials") as view:
        view.update(trials)
        view.update(trials)
        assert view._summary()[0].startswith("1 of 2 trials ended (1 failed), 1 running, ")
    assert file.getvalue().count(LINE) == 1


def test_the_total_is_that_of_a_sweep_that_people_extend(trials: list[TrialResult]) -> None:
    planned = [2]
    with SweepView(Console(file=io.StringIO(), width=160), made_up_spec(), lambda: planned[-1], "a sweep") as view:
        view.update(trials)
        planned.append(5)
        view.update(trials)
        assert view._summary()[0].startswith("1 of 5 trials ended")


def test_a_sweep_that_has_ended_itself_waits_for_its_own_trials_only(trials: list[TrialResult]) -> None:
    """Two of 20 trials exist, and no other one comes."""
    console = Console(file=io.StringIO(), width=160)
    with SweepView(console, made_up_spec(), lambda: 20, "sweep of 20 trials", has_ended_itself=lambda: True) as view:
        view.update(trials)
        assert view._summary()[0].startswith("1 of 2 trials ended")


def test_what_libraries_print_does_not_come_between_the_lines_of_the_table() -> None:
    before = sys.stdout, sys.stderr
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as file:
        with SweepView(Console(file=file), made_up_spec(), lambda: 2, "sweep of 2 trials"):
            assert (sys.stdout, sys.stderr) == before
        with TrialView(Console(file=file), "a trial"):
            assert (sys.stdout, sys.stderr) == before
    os.close(ours)


def test_failures_are_listed_at_the_end(trials: list[TrialResult]) -> None:
    file = io.StringIO()
    say_failures(Console(file=file, width=40), trials)
    assert file.getvalue() == f"1 of 2 trials failed:\n  {LINE}\n"
    file = io.StringIO()
    say_failures(Console(file=file, width=40), trials[:1])
    assert file.getvalue() == ""
