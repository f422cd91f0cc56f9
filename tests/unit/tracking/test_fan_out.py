from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import MetricPoint, SweepPaths, TrialPaths, TrialResult, TrialState, read_metrics
from orchestrator.spec import parse_spec
from orchestrator.spec.sections import TrackingSection
from orchestrator.tracking import Trackers, open_trackers
from orchestrator.tracking.jsonl import JsonlTracker
from orchestrator.tracking.protocol import TrialIdentity


class Memory:
    """A view that remembers, and fails where it is told to."""

    def __init__(self, name: str, fails_in: str = "") -> None:
        self.name = name
        self.calls: list[Any] = []
        self._fails_in = fails_in

    def log(self, point: MetricPoint) -> None:
        self.calls.append(point.step)
        if self._fails_in == "log":
            raise ConnectionError("nobody answers")

    def finish(self, result: TrialResult) -> None:
        self.calls.append(result.state)
        if self._fails_in == "finish":
            raise ConnectionError("nobody answers")


@pytest.fixture
def paths(tmp_path: Path) -> TrialPaths:
    return SweepPaths(tmp_path / "s").trial("a")


@pytest.fixture
def result(document: dict[str, Any]) -> TrialResult:
    config = parse_spec(document).trial_config({})
    return TrialResult(trial_id="a", state=TrialState.COMPLETE, config=config, metric="eval/loss", mode="min")


def test_every_view_has_every_point(paths: TrialPaths, result: TrialResult) -> None:
    views = [Memory("one"), Memory("two")]
    trackers = Trackers(JsonlTracker(paths, 0), list(views))
    _log(trackers, 1, 2)
    trackers.finish(result)
    assert [view.calls for view in views] == [[1, 2, "COMPLETE"]] * 2
    assert _steps(paths) == [1, 2]
    assert trackers.warnings == []


def test_a_view_that_fails_is_one_warning_and_the_others_go_on(paths: TrialPaths, result: TrialResult) -> None:
    views = [Memory("one", "log"), Memory("two"), Memory("three", "finish"), Memory("four")]
    trackers = Trackers(JsonlTracker(paths, 0), list(views))
    _log(trackers, 1, 2, 3)
    trackers.finish(result)
    assert [view.calls for view in views] == [[1], *[[1, 2, 3, "COMPLETE"]] * 3]
    assert _steps(paths) == [1, 2, 3]
    assert trackers.warnings == [
        f"{name} failed and records no more of this trial: ConnectionError: nobody answers" for name in ("one", "three")
    ]
    trackers.finish(result)
    assert views[1].calls == [1, 2, 3, "COMPLETE"], "finished once"


def test_the_truths_own_fault_is_raised(paths: TrialPaths) -> None:
    view = Memory("one")
    trackers = Trackers(JsonlTracker(paths, 0), [view])
    paths.metrics.unlink()
    paths.metrics.mkdir()
    with pytest.raises(IsADirectoryError):
        _log(trackers, 1)
    assert view.calls == [], "a view never shows what is not on disk"


def test_a_resumed_trial_drops_what_it_will_measure_again(paths: TrialPaths) -> None:
    _log(Trackers(JsonlTracker(paths, 0), []), 10, 20, 30, 40)
    with paths.metrics.open("a") as file:
        file.write('{"step": 50, "tok')  # the worker died here
    resumed = Trackers(JsonlTracker(paths, 20), [])
    assert _steps(paths) == [10, 20]
    _log(resumed, 30)
    assert _steps(paths) == [10, 20, 30]
    JsonlTracker(paths, 0)
    assert _steps(paths) == [], "a fresh start"


def test_what_is_switched_off_is_not_opened(paths: TrialPaths, result: TrialResult) -> None:
    off = TrackingSection.model_validate({"tensorboard": False, "wandb": {"mode": "disabled"}})
    trackers = open_trackers(TrialIdentity(paths, result.config, off, "eval/loss", 0))
    _log(trackers, 1)
    trackers.finish(result)
    assert [path.name for path in paths.sweep.rglob("*") if path.is_file()] == ["metrics.jsonl"]


def test_an_identity_is_flat_for_trackers_that_know_no_nesting(paths: TrialPaths, result: TrialResult) -> None:
    identity = TrialIdentity(paths, result.config, TrackingSection(), "eval/loss", 0)
    flat = identity.config.dotted()
    assert identity.group == "s"
    assert (flat["lora.rank"], flat["training.learning_rate"], flat["base.model"]) == (16, 2e-4, "embedded")
    assert {name.partition(".")[0] for name in flat} == {"base", "data", "lora", "training", "evaluation"}


def _log(trackers: Trackers, *steps: int) -> None:
    for step in steps:
        trackers.log(MetricPoint(step=step, tokens=step, time_s=step, values={"eval/loss": 1 / step}))


def _steps(paths: TrialPaths) -> list[int]:
    return [point.step for point in read_metrics(paths)]
