from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tracked import identify

from orchestrator.record import MetricPoint, SweepPaths, TrialPaths, TrialResult, TrialState, read_metrics
from orchestrator.spec import parse_spec
from orchestrator.spec.sections import TrackingSection
from orchestrator.tracking import Trackers, fan_out, open_trackers
from orchestrator.tracking.jsonl import JsonlTracker
from orchestrator.tracking.protocol import TrialIdentity


class Memory:
    """A view that remembers its calls and fails in the given method."""

    def __init__(self, name: str, fails_in: str = "") -> None:
        self.name = name
        self.calls: list[Any] = []
        self._fails_in = fails_in

    def replay(self, points: Sequence[MetricPoint]) -> None:
        self.calls.append([point.step for point in points])

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


def test_every_view_receives_every_point(paths: TrialPaths, result: TrialResult) -> None:
    views = [Memory("one"), Memory("two")]
    trackers = Trackers(JsonlTracker(paths, 0), list(views))
    _log(trackers, 1, 2)
    trackers.finish(result)
    assert [view.calls for view in views] == [[1, 2, "COMPLETE"]] * 2
    assert _steps(paths) == [1, 2]
    assert trackers.warnings == []


def test_a_failing_view_gives_one_warning_and_the_others_continue(paths: TrialPaths, result: TrialResult) -> None:
    views = [Memory("one", "log"), Memory("two"), Memory("three", "finish"), Memory("four")]
    trackers = Trackers(JsonlTracker(paths, 0), list(views))
    _log(trackers, 1, 2, 3)
    trackers.finish(result)
    assert [view.calls for view in views] == [[1], *[[1, 2, 3, "COMPLETE"]] * 3]
    assert _steps(paths) == [1, 2, 3]
    fault = "failed: ConnectionError: nobody answers; training continues, and missing records are sent after it ends"
    assert trackers.warnings == [f"{name} {fault}" for name in ("one", "three")]
    assert trackers.untracked == ["one", "three"]
    trackers.finish(result)
    assert views[1].calls == [1, 2, 3, "COMPLETE"], "a view is finished only once"


def test_a_view_of_a_trial_that_will_continue_is_incomplete(paths: TrialPaths, result: TrialResult) -> None:
    trackers = Trackers(JsonlTracker(paths, 0), [Memory("one")])
    trackers.finish(result.model_copy(update={"state": TrialState.RUNNING}))
    assert trackers.untracked == ["one"]


def test_a_view_that_cannot_be_opened_gives_a_warning_and_the_others_are_opened(
    paths: TrialPaths, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds for a new trial, which would otherwise use up all its attempts."""
    opened: list[Memory] = []

    def fail(_: TrialIdentity) -> Memory:
        raise PermissionError("http://alice:s3cret@host\nsays no")

    def succeed(_: TrialIdentity) -> Memory:
        opened.append(Memory("MLflow"))
        return opened[-1]

    monkeypatch.setitem(fan_out._TRACKERS, "TensorBoard", lambda: fail)
    monkeypatch.setitem(fan_out._TRACKERS, "MLflow", lambda: succeed)
    spec = parse_spec(document | {"tracking": {"wandb": {"mode": "disabled"}, "mlflow": True}})
    _log(Trackers(JsonlTracker(paths, 0), []), 10, 20, 30)
    trackers = open_trackers(identify(paths, spec, step=20))
    _log(trackers, 30)
    (warning,) = trackers.warnings
    assert warning.startswith("TensorBoard failed: PermissionError: http://***@host says no; ")
    assert trackers.untracked == ["TensorBoard", "MLflow"]
    assert opened[0].calls == [[10, 20], 30], "it first receives the points on disk"


def test_an_error_of_the_authoritative_record_is_raised(paths: TrialPaths) -> None:
    view = Memory("one")
    trackers = Trackers(JsonlTracker(paths, 0), [view])
    paths.metrics.unlink()
    paths.metrics.mkdir()
    with pytest.raises(IsADirectoryError):
        _log(trackers, 1)
    assert view.calls == [], "a view never shows a point that is not on disk"


def test_a_resumed_trial_drops_points_that_it_will_measure_again(paths: TrialPaths) -> None:
    _log(Trackers(JsonlTracker(paths, 0), []), 10, 20, 30, 40)
    with paths.metrics.open("a") as file:
        file.write('{"step": 50, "tok')  # the worker died here
    resumed = Trackers(JsonlTracker(paths, 20), [])
    assert _steps(paths) == [10, 20]
    _log(resumed, 30)
    assert _steps(paths) == [10, 20, 30]
    JsonlTracker(paths, 0)
    assert _steps(paths) == [], "a new trial starts without points"


def test_a_tracker_that_is_switched_off_is_not_opened(
    paths: TrialPaths, result: TrialResult, document: dict[str, Any]
) -> None:
    spec = parse_spec(document | {"tracking": {"tensorboard": False, "wandb": {"mode": "disabled"}}})
    trackers = open_trackers(identify(paths, spec))
    _log(trackers, 1)
    trackers.finish(result)
    assert [path.name for path in paths.sweep.rglob("*") if path.is_file()] == ["metrics.jsonl"]


def test_an_identity_has_a_flat_configuration_for_trackers_without_nesting(
    paths: TrialPaths, document: dict[str, Any]
) -> None:
    identity = identify(paths, parse_spec(document))
    flat = identity.config.dotted()
    assert identity.group == "s"
    assert (flat["lora.rank"], flat["training.learning_rate"], flat["base.model"]) == (16, 2e-4, "embedded")
    assert {name.partition(".")[0] for name in flat} == {"base", "data", "lora", "training", "evaluation"}


def _log(trackers: Trackers, *steps: int) -> None:
    for step in steps:
        trackers.log(MetricPoint(step=step, tokens=step, time_s=step, values={"eval/loss": 1 / step}))


def _steps(paths: TrialPaths) -> list[int]:
    return [point.step for point in read_metrics(paths)]


def test_each_field_of_the_tracking_section_opens_its_tracker() -> None:
    nothing = {"tensorboard": False, "wandb": {"mode": "disabled"}, "mlflow": False, "trackio": False}
    assert set(nothing) == set(TrackingSection.model_fields)
    opened = []
    for field in nothing:
        value = {"mode": "offline"} if field == "wandb" else True
        opened += fan_out.wanted(TrackingSection.model_validate(nothing | {field: value}))
    assert sorted(opened) == sorted(fan_out._TRACKERS)
