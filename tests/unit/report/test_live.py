"""The live view of a running sweep."""

import io
import os
import pty
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from orchestrator.record import TrialResult, TrialState
from orchestrator.report.live import SweepView
from orchestrator.report.tables import say_failures
from orchestrator.spec import parse_spec

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
    with SweepView(console, 2, "sweep of 2 trials") as view:
        view.update(trials)
        view.update(trials)
        assert "1 of 2 trials ended (1 failed)" in view._summary().plain
    assert file.getvalue().count(LINE) == 1


def test_a_sweep_that_has_ended_itself_waits_for_its_own_trials_only(trials: list[TrialResult]) -> None:
    """Two of 20 trials exist, and one of them has half of its 40 steps to go."""
    console = Console(file=io.StringIO(), width=160)
    with SweepView(console, 20, "sweep of 20 trials", has_ended_itself=lambda: True) as view:
        running = trials[0].model_copy(update={"step": 10, "total_steps": 40})
        view.update([running, trials[1]])
        view._first_seen = time.monotonic() - 10, 0
        view.update([running.model_copy(update={"step": 20}), trials[1]])
        assert view._summary().plain.startswith("1 of 2 trials ended")
        assert view._seconds_left() == pytest.approx(10, abs=1)


def test_standard_streams_are_restored_after_the_terminal_is_closed() -> None:
    """A live table replaces both streams. Later output must not go to its closed console."""
    before = sys.stdout, sys.stderr
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as file:
        with SweepView(Console(file=file), 2, "sweep of 2 trials"):
            assert sys.stderr is not before[1]
            # The same as `leave_dead_terminal` does with a closed terminal.
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, theirs)
            os.close(nowhere)
        after = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = before  # even if the test fails
    os.close(ours)
    assert after == before


def test_failures_are_listed_at_the_end(trials: list[TrialResult]) -> None:
    file = io.StringIO()
    say_failures(Console(file=file, width=40), trials)
    assert file.getvalue() == f"1 of 2 trials failed:\n  {LINE}\n"
    file = io.StringIO()
    say_failures(Console(file=file, width=40), trials[:1])
    assert file.getvalue() == ""
