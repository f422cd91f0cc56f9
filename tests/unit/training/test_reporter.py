"""When a trial writes a checkpoint before it stops."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.record import SweepPaths, TrialResult, TrialState
from orchestrator.spec import parse_spec
from orchestrator.training.attempt.events import Event, Saved, Stepped
from orchestrator.training.attempt.reporter import Reporter
from orchestrator.training.write_queue import WriteNow


class Listener:
    """Ends the trial, with or without a checkpoint."""

    def __init__(self, stopping: bool, wants_checkpoint: bool) -> None:
        self.stopping = stopping
        self.wants_checkpoint = wants_checkpoint
        self.events: list[Event] = []

    def on_step(self, step: int, total_steps: int) -> None:
        pass

    def on_progress(self) -> None:
        pass

    def emit(self, event: Event) -> None:
        self.events.append(event)


def make(document: dict[str, Any], tmp_path: Path, listener: Listener) -> Reporter:
    config = parse_spec(document).trial_config({})
    start = TrialResult(trial_id="a", state=TrialState.RUNNING, config=config, metric="eval/loss", mode="min", step=4)
    paths = SweepPaths(tmp_path).trial("a")
    return Reporter(start, paths, listener, WriteNow(), lambda _: (0.0, 0.0), None, "f", [])


def control(**values: bool) -> Any:
    names = ("should_save", "should_log", "should_evaluate", "should_training_stop")
    return SimpleNamespace(**(dict.fromkeys(names, False) | values))


@pytest.mark.parametrize(
    ("stopping", "wants_checkpoint", "saves"),
    [(False, False, False), (True, False, False), (True, True, True)],
    ids=["continues", "stopped for good", "interrupted"],
)
def test_only_a_trial_that_continues_later_writes_a_checkpoint(
    document: dict[str, Any], tmp_path: Path, stopping: bool, wants_checkpoint: bool, saves: bool
) -> None:
    listener = Listener(stopping, wants_checkpoint)
    reporter, asked, state = make(document, tmp_path, listener), control(), SimpleNamespace(global_step=7, max_steps=40)
    reporter.on_step_end(None, state, asked)
    assert (asked.should_save, asked.should_log, asked.should_training_stop) == (saves, saves, stopping)
    assert reporter.stopped == stopping


def test_step_with_a_checkpoint_gets_no_second_one(document: dict[str, Any], tmp_path: Path) -> None:
    listener = Listener(stopping=False, wants_checkpoint=True)
    reporter, state = make(document, tmp_path, listener), SimpleNamespace(global_step=7, max_steps=40)
    (tmp_path / "trials/a/checkpoints/checkpoint-7").mkdir(parents=True)
    reporter.on_step_end(None, state, control())
    listener.stopping = True  # while the checkpoint is written
    asked = control()
    reporter.on_save(None, state, asked)
    assert asked.should_training_stop
    assert not asked.should_save
    (saved,) = [event for event in listener.events if isinstance(event, Saved)]
    assert (saved.step, saved.checkpoint) == (7, "checkpoints/checkpoint-7")


def test_steps_are_reported_every_few_seconds_while_nothing_is_logged(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("orchestrator.training.attempt.reporter.time.monotonic", lambda: now)
    listener = Listener(stopping=False, wants_checkpoint=False)
    reporter = make(document, tmp_path, listener)
    for step in range(6, 20):
        now += 1.0
        should_log = step == 12
        reporter.on_step_end(None, SimpleNamespace(global_step=step, max_steps=40), control(should_log=should_log))
    assert [event.step for event in listener.events if isinstance(event, Stepped)] == [9, 16]
