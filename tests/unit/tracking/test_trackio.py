"""Records of the trackio tracker, read back with trackio's own readers."""

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tracked import identify, outcome, point_at

from orchestrator.errors import RequestError
from orchestrator.record import SweepPaths, TrialPaths, TrialState
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.tracking.trackio import TrackioTracker, trackio_fault


@pytest.fixture(scope="module")
def trial_paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TrialPaths]:
    """Return a function for the trials of this process's only sweep: the library reads its folder once."""
    if find_spec("trackio") is None:  # not `import trackio`, because the tracker must import it first
        pytest.skip("trackio is not installed")
    patch = pytest.MonkeyPatch()
    for name in ("HF_TOKEN", "TRACKIO_DIR", "TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"):
        patch.delenv(name, raising=False)  # with a token the library would ask the Hub for its owner
    paths = SweepPaths(tmp_path_factory.mktemp("trackio") / "first")
    yield paths.trial
    patch.undo()


@pytest.fixture
def spec(document: dict[str, Any]) -> SweepSpec:
    return parse_spec(document)


def test_a_trial_is_read_back(trial_paths: Callable[[str], TrialPaths], spec: SweepSpec) -> None:
    paths = trial_paths("a_00001")
    tracker = TrackioTracker(identify(paths, spec))
    for step in (1, 2, 3):
        tracker.log(point_at(step))
    tracker.finish(outcome(paths, spec, TrialState.STOPPED, best_step=2, step=3))
    (run,) = _runs("a_00001")
    assert run.config is not None
    assert run.config["_Group"] == "first"
    assert {name: run.config[name] for name in ("lora.rank", "base.model")} == {
        "lora.rank": 16,
        "base.model": "embedded",
    }
    logs = _logs(run)
    assert [(log["step"], log["eval/loss"]) for log in logs if "eval/loss" in log] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [log["progress/tokens"] for log in logs if "progress/tokens" in log] == [10, 20, 30]
    assert [(log["step"], log["state"], log["best/eval/loss"]) for log in logs if "state" in log] == [
        (3, "STOPPED", 0.5)
    ]
    assert [path.name for path in paths.sweep.iterdir()] == ["trackio"]
    assert "TRACKIO_DIR" not in os.environ, "child processes do not inherit the folder"


def test_a_resumed_trial_continues_its_run(trial_paths: Callable[[str], TrialPaths], spec: SweepSpec) -> None:
    paths = trial_paths("a_00002")
    first = TrackioTracker(identify(paths, spec))
    first.log(point_at(1))
    first.finish(outcome(paths, spec, TrialState.RUNNING, step=1))
    (run,) = _runs("a_00002")
    again = TrackioTracker(identify(paths, spec))
    again.replay([point_at(1)])  # the run already has this point
    again.log(point_at(2))
    again.finish(outcome(paths, spec, TrialState.COMPLETE, step=2))
    (now,) = _runs("a_00002")
    assert now.id == run.id
    assert [log["eval/loss"] for log in _logs(now) if "eval/loss" in log] == [1.0, 0.5]
    assert [log["state"] for log in _logs(now) if "state" in log] == ["RUNNING", "COMPLETE"]


def test_missing_points_are_recorded_later(trial_paths: Callable[[str], TrialPaths], spec: SweepSpec) -> None:
    paths = trial_paths("a_00005")
    tracker = TrackioTracker(identify(paths, spec))
    tracker.replay([point_at(1), point_at(2)])
    tracker.finish(outcome(paths, spec, TrialState.COMPLETE, step=2))
    (run,) = _runs("a_00005")
    assert [log["eval/loss"] for log in _logs(run) if "eval/loss" in log] == [1.0, 0.5]


def test_a_server_that_does_not_answer_is_reported_before_the_first_trial(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRACKIO_SERVER_URL", raising=False)
    assert trackio_fault() is None
    monkeypatch.setenv("TRACKIO_SERVER_URL", serve("refuse").replace("http://", "http://alice:s3cret@"))
    fault = trackio_fault()
    assert fault is not None
    assert "tracking.trackio: http://***@127.0.0.1:" in fault.message
    assert "does not answer" in fault.message
    monkeypatch.setenv("TRACKIO_SERVER_URL", serve(404))
    assert trackio_fault() is None, "the server answers"


def test_a_second_folder_in_the_same_process_is_refused(
    trial_paths: Callable[[str], TrialPaths], spec: SweepSpec, tmp_path: Path
) -> None:
    paths = trial_paths("a_00003")
    TrackioTracker(identify(paths, spec)).finish(outcome(paths, spec, TrialState.COMPLETE, step=1))
    with pytest.raises(RequestError, match=r"writes to .*first/trackio in this process, not to .*other/trackio"):
        TrackioTracker(identify(SweepPaths(tmp_path / "other").trial("b"), spec))


def test_files_that_cannot_be_written_are_reported(trial_paths: Callable[[str], TrialPaths], spec: SweepSpec) -> None:
    paths = trial_paths("a_00004")
    tracker = TrackioTracker(identify(paths, spec))
    shutil.rmtree(paths.trackio)
    paths.trackio.touch()
    tracker.log(point_at(1))
    with pytest.raises(OSError, match=r"(?i)trackio"):
        tracker.finish(outcome(paths, spec, TrialState.COMPLETE, step=1))
    paths.trackio.unlink()


def test_a_missing_package_is_reported_when_the_experiment_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if the extra were not installed
    with pytest.raises(RequestError, match=r"tracking.trackio needs the package trackio") as refused:
        load_spec(Path(__file__).parents[3] / "experiments" / "demo.yaml", ["tracking.trackio=true"])
    assert refused.value.remedy == "pip install 'qlora-orchestrator[trackio]'"


def _runs(name: str) -> list[Any]:
    import trackio

    return [run for run in trackio.Api().runs("orchestrator") if run.name == name]


def _logs(run: Any) -> list[dict[str, Any]]:
    import trackio

    return list(trackio.SQLiteStorage.get_logs("orchestrator", run.name, run_id=run.id))
