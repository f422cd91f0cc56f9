"""What trackers lack of trials that have ended."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from orchestrator.record import (
    MetricPoint,
    SweepPaths,
    SweepRecord,
    TrialPaths,
    TrialResult,
    TrialState,
    read_result,
    read_sweep,
    write_record,
)
from orchestrator.tracking import fan_out
from orchestrator.tracking.catch_up import catch_up
from orchestrator.tracking.jsonl import JsonlTracker
from orchestrator.tracking.protocol import TrialIdentity

TRIALS = {"a": ("COMPLETE", 0.5), "b": ("FAILED", None), "c": ("STOPPED", 0.7)}
LACKING = {"a": ["W&B", "MLflow"], "b": ["W&B"], "c": []}


class Given:
    """A tracker that remembers what each trial gave it."""

    name = "W&B"
    trials: dict[str, tuple[list[int], str]]

    def __init__(self, identity: TrialIdentity) -> None:
        self._trial = identity.paths.trial_id
        self._steps: list[int] = []

    def replay(self, points: Sequence[MetricPoint]) -> None:
        self._steps = [point.step for point in points]

    def log(self, point: MetricPoint) -> None:
        raise AssertionError("nothing new comes")

    def finish(self, result: TrialResult) -> None:
        self.trials[self._trial] = self._steps, str(result.state)


@pytest.fixture
def record(make_sweep: Callable[..., SweepPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepRecord:
    sweep = read_sweep(make_sweep(tmp_path / "s", TRIALS).root)
    for trial in sweep.trials():
        paths = sweep.paths.trial(trial.trial_id)
        failed = [f"{name} failed: nobody answers" for name in LACKING[trial.trial_id]]
        write_record(paths.result, trial.model_copy(update={"untracked": LACKING[trial.trial_id], "warnings": failed}))
        jsonl = JsonlTracker(paths, 0)
        for step in (1, 2):
            jsonl.log(MetricPoint(step=step, tokens=step, time_s=step, values={"eval/loss": 1.0}))
    Given.trials = {}
    monkeypatch.setitem(fan_out._KINDS, "W&B", lambda: Given)
    return sweep


def test_a_sweep_that_was_interrupted_is_left_as_it_is(record: SweepRecord) -> None:
    paths = record.paths.trial("c")
    paths.result.rename(paths.progress)
    stopped = TrialResult.model_validate_json(paths.progress.read_text())
    write_record(paths.progress, stopped.model_copy(update={"state": TrialState.RUNNING}))
    catch_up(record, lambda sentence: pytest.fail(sentence))
    assert Given.trials == {}


def test_ended_trials_are_given_whole_and_those_that_lack_nothing_are_left_alone(
    record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fan_out._KINDS, "MLflow", lambda: Given)
    before = _written(record.paths.trial("c"))
    said: list[str] = []
    catch_up(record, said.append)
    assert Given.trials == {"a": ([1, 2], "COMPLETE"), "b": ([1, 2], "FAILED")}
    assert all(not read_result(record.paths.trial(name)).untracked for name in "abc")
    assert _written(record.paths.trial("c")) == before
    assert sorted(said) == ["MLflow has been given the rest of 1 trial", "W&B has been given the rest of 2 trials"]
    catch_up(record, said.append)
    assert len(said) == 2, "done is done"


def test_a_trial_that_ended_while_it_was_paused_is_given_without_a_word(record: SweepRecord) -> None:
    for name in "ab":
        result = read_result(record.paths.trial(name))
        write_record(record.paths.trial(name).result, result.model_copy(update={"untracked": ["W&B"], "warnings": []}))
    catch_up(record, lambda sentence: pytest.fail(sentence))
    assert Given.trials == {"a": ([1, 2], "COMPLETE"), "b": ([1, 2], "FAILED")}


def test_a_tracker_that_fails_again_is_asked_once_and_told_once(
    record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fail(identity: TrialIdentity) -> Given:
        asked.append(identity.paths.trial_id)
        raise ConnectionError("http://alice:s3cret@host is down")

    monkeypatch.setitem(fan_out._KINDS, "W&B", lambda: fail)
    monkeypatch.setitem(fan_out._KINDS, "MLflow", lambda: Given)
    said: list[str] = []
    catch_up(record, said.append)
    assert len(asked) == 1
    assert read_result(record.paths.trial("a")).untracked == ["W&B"]
    assert read_result(record.paths.trial("b")).untracked == ["W&B"]
    given, warning = said
    assert given == "MLflow has been given the rest of 1 trial"
    assert warning == (
        "warning: W&B lacks 2 trials: ConnectionError: http://***@host is down; "
        f"`orchestrator resume {record.paths.root}` tries again"
    )


def _written(paths: TrialPaths) -> int:
    return paths.result.stat().st_mtime_ns
