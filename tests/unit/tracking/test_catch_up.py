"""Trackers receive the records that they missed after trials have ended."""

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
from orchestrator.record.checked import read_record
from orchestrator.tracking import fan_out
from orchestrator.tracking.catch_up import catch_up
from orchestrator.tracking.jsonl import JsonlTracker
from orchestrator.tracking.protocol import TrialIdentity

TRIALS = {"a": ("COMPLETE", 0.5), "b": ("FAILED", None), "c": ("STOPPED", 0.7)}
LACKING = {"a": ["W&B", "MLflow"], "b": ["W&B"], "c": []}


class Recorder:
    """A tracker that remembers the steps and the state of each trial."""

    name = "W&B"
    trials: dict[str, tuple[list[int], str]]

    def __init__(self, identity: TrialIdentity) -> None:
        self._trial = identity.paths.trial_id
        self._steps: list[int] = []

    def replay(self, points: Sequence[MetricPoint]) -> None:
        self._steps = [point.step for point in points]

    def log(self, point: MetricPoint) -> None:
        raise AssertionError("there are no new points")

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
    Recorder.trials = {}
    monkeypatch.setitem(fan_out._TRACKERS, "W&B", lambda: Recorder)
    return sweep


def test_an_interrupted_sweep_is_left_unchanged(record: SweepRecord) -> None:
    paths = record.paths.trial("c")
    paths.result.rename(paths.progress)
    stopped = read_record(TrialResult, paths.progress)
    write_record(paths.progress, stopped.model_copy(update={"state": TrialState.RUNNING}))
    catch_up(record, lambda sentence: pytest.fail(sentence))
    assert Recorder.trials == {}


def test_missing_records_are_sent_and_complete_trials_are_left_unchanged(
    record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fan_out._TRACKERS, "MLflow", lambda: Recorder)
    before = _written(record.paths.trial("c"))
    said: list[str] = []
    catch_up(record, said.append)
    assert Recorder.trials == {"a": ([1, 2], "COMPLETE"), "b": ([1, 2], "FAILED")}
    assert all(not read_result(record.paths.trial(name)).untracked for name in "abc")
    assert _written(record.paths.trial("c")) == before
    assert sorted(said) == [
        "MLflow has received the missing records of 1 trial",
        "W&B has received the missing records of 2 trials",
    ]
    catch_up(record, said.append)
    assert len(said) == 2, "the second call has nothing to send"


def test_nothing_is_said_about_a_trial_that_ended_while_it_was_paused(record: SweepRecord) -> None:
    for name in "ab":
        result = read_result(record.paths.trial(name))
        write_record(record.paths.trial(name).result, result.model_copy(update={"untracked": ["W&B"], "warnings": []}))
    catch_up(record, lambda sentence: pytest.fail(sentence))
    assert Recorder.trials == {"a": ([1, 2], "COMPLETE"), "b": ([1, 2], "FAILED")}


def test_a_tracker_that_fails_again_is_tried_once_and_reported_once(
    record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fail(identity: TrialIdentity) -> Recorder:
        tried.append(identity.paths.trial_id)
        raise ConnectionError("http://alice:s3cret@host is down")

    monkeypatch.setitem(fan_out._TRACKERS, "W&B", lambda: fail)
    monkeypatch.setitem(fan_out._TRACKERS, "MLflow", lambda: Recorder)
    said: list[str] = []
    catch_up(record, said.append)
    assert len(tried) == 1
    assert read_result(record.paths.trial("a")).untracked == ["W&B"]
    assert read_result(record.paths.trial("b")).untracked == ["W&B"]
    given, warning = said
    assert given == "MLflow has received the missing records of 1 trial"
    assert warning == (
        "warning: W&B is missing records of 2 trials: ConnectionError: http://***@host is down; "
        f"`orchestrator resume {record.paths.root}` tries again"
    )


def _written(paths: TrialPaths) -> int:
    return paths.result.stat().st_mtime_ns
