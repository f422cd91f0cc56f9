"""Records of the MLflow tracker, read back with MLflow's own client."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tracked import identify, outcome, point_at

from orchestrator.record import SweepPaths, TrialPaths, TrialState
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.tracking import open_trackers
from orchestrator.tracking.mlflow import MlflowTracker, mlflow_fault
from orchestrator.tracking.protocol import TrialIdentity

ONLY_MLFLOW = {"tensorboard": False, "wandb": {"mode": "disabled"}, "mlflow": True}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that variables set by the tracker are removed after the test
        monkeypatch.delenv(name)


@pytest.fixture
def paths(tmp_path: Path) -> TrialPaths:
    return SweepPaths(tmp_path / "first").trial("a_00001")


@pytest.fixture
def spec(document: dict[str, Any]) -> SweepSpec:
    return parse_spec(document | {"tracking": ONLY_MLFLOW})


def test_a_trial_is_read_back(paths: TrialPaths, spec: SweepSpec) -> None:
    tracker = MlflowTracker(identify(paths, spec))
    (run,) = _runs(paths)
    assert run.info.status == "RUNNING"
    for step in (1, 2, 3):
        tracker.log(point_at(step))
    tracker.finish(outcome(paths, spec, TrialState.COMPLETE, best_step=2))
    (run,) = _runs(paths)
    assert run.info.run_name == "a_00001"
    assert run.info.status == "FINISHED"
    assert run.data.tags["state"] == "COMPLETE"
    assert run.data.params == {name: str(value) for name, value in spec.trial_config({}).dotted().items()}
    assert run.data.params["training.learning_rate"] == "0.0002"
    assert _history(paths, "eval/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert _history(paths, "progress/tokens") == [(1, 10), (2, 20), (3, 30)]
    assert _history(paths, "best/eval/loss") == [(2, 0.5)]
    assert sorted(path.name for path in paths.sweep.iterdir()) == ["mlflow"]


@pytest.mark.parametrize(
    ("state", "status"),
    [("COMPLETE", "FINISHED"), ("STOPPED", "FINISHED"), ("CANCELLED", "KILLED"), ("FAILED", "FAILED")],
)
def test_a_run_has_the_status_of_its_trial(paths: TrialPaths, spec: SweepSpec, state: str, status: str) -> None:
    MlflowTracker(identify(paths, spec)).finish(outcome(paths, spec, TrialState(state)))
    (run,) = _runs(paths)
    assert (run.info.status, run.data.tags["state"]) == (status, state)


def test_a_resumed_trial_continues_its_run(paths: TrialPaths, spec: SweepSpec) -> None:
    first = MlflowTracker(identify(paths, spec))
    first.log(point_at(1))
    first.finish(outcome(paths, spec, TrialState.RUNNING))
    (run,) = _runs(paths)
    assert run.info.status == "RUNNING", "the trial will continue"
    MlflowTracker(identify(paths, spec)).finish(outcome(paths, spec, TrialState.FAILED))
    changed = parse_spec(spec.model_dump() | {"lora": {"rank": 4}})  # PBT changes values like this
    identity = identify(paths, changed, step=1)
    config = identity.config.model_copy(update={"varied": {"lora.rank": 4, "lora.dropout": 0.05}})
    start = identity.start.model_copy(update={"config": config})
    again = MlflowTracker(TrialIdentity(paths, start, changed))
    assert [run.info.status for run in _runs(paths)] == ["RUNNING"]
    again.log(point_at(2))
    again.finish(outcome(paths, changed, TrialState.COMPLETE))
    (now,) = _runs(paths)
    assert now.info.run_id == run.info.run_id
    assert (now.info.status, now.data.params["lora.rank"], now.data.tags["lora.rank"]) == ("FINISHED", "16", "4")
    assert "lora.dropout" not in now.data.tags, "the value has not changed"
    assert _history(paths, "eval/loss") == [(1, 1.0), (2, 0.5)]


def test_trials_that_start_at_the_same_time_share_an_experiment(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from orchestrator.record import SweepPaths
from orchestrator.spec import parse_spec
from orchestrator.record import TrialResult
from orchestrator.tracking.mlflow import MlflowTracker
from orchestrator.tracking.protocol import TrialIdentity
data = {{"source": "embedded", "format": "template", "template": "{{question}} {{answer}}"}}
spec = parse_spec({{"base": {{"model": "embedded"}}, "data": data}})
paths = SweepPaths(Path({str(tmp_path / "first")!r})).trial(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
config = spec.trial_config({{}})
start = TrialResult(trial_id=sys.argv[1], state="RUNNING", config=config, metric="eval/loss", mode="min")
MlflowTracker(TrialIdentity(paths, start, spec))
"""
    names = ["a", "b"]
    calls = [[sys.executable, "-c", code, name] for name in names]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True) for call in calls]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait() for process in started] == [0, 0]
    assert sorted(run.info.run_name for run in _runs(SweepPaths(tmp_path / "first").trial("a"))) == names


def test_an_address_in_the_environment_is_used(
    paths: TrialPaths, spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    MlflowTracker(identify(paths, spec)).log(point_at(1))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("first")
    assert experiment is not None
    assert [run.info.run_name for run in client.search_runs([experiment.experiment_id])] == ["a_00001"]
    assert not paths.mlflow.exists()


@pytest.mark.parametrize("kind", [401, "hang", "close", "refuse"])
def test_a_server_that_cannot_be_used_is_reported_before_the_first_trial(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: int | str
) -> None:
    assert mlflow_fault() is None, "without an address there is no server to check"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serve(kind).replace("http://", "http://alice:s3cret%20pw@"))
    began = time.monotonic()
    fault = mlflow_fault()
    assert time.monotonic() - began < 8
    assert fault is not None
    assert fault.message.startswith("tracking.mlflow: http://127.0.0.1:")
    assert "cannot be used: " in fault.message
    assert "MLFLOW_TRACKING_PASSWORD" in fault.remedy
    assert "s3cret" not in f"{fault.message} {fault.remedy}"


def test_a_password_that_makes_the_address_invalid_is_reported_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:pa/ss#word@127.0.0.1:9")
    fault = mlflow_fault()
    assert fault is not None
    assert "its password contains one of / ? #" in fault.message
    assert "ss" not in fault.message.replace("address", "").replace("password", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+nodriver://alice:s3cret@127.0.0.1:9/runs")
    fault = mlflow_fault()
    assert fault is not None
    assert "s3cret" not in str(fault)


def test_a_server_that_is_down_stops_no_trial_and_shows_no_password(
    paths: TrialPaths, spec: SweepSpec, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serve("refuse").replace("http://", "http://alice:s3cret@"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trackers = open_trackers(identify(paths, spec))
    (warning,) = trackers.warnings
    assert warning.startswith("MLflow failed: MlflowException: API request to http://127.0.0.1:")
    assert "s3cret" not in warning
    trackers.log(point_at(2))
    assert paths.metrics.read_text().count("\n") == 1
    assert trackers.untracked == ["MLflow"]


def test_a_server_with_a_login_records_a_trial_and_receives_missing_points_later(
    paths: TrialPaths,
    spec: SweepSpec,
    serve: Callable[..., str],
    mlflow_server: Callable[[str, str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The address contains a user name and a password with percent-encoded characters."""
    server = mlflow_server("alice", "s3c@r:et/")
    address = serve(server.answer).replace("http://", "http://alice:s3c%40r%3Aet%2F@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert mlflow_fault() is None
    trackers = open_trackers(identify(paths, spec))
    trackers.log(point_at(1))
    server.is_down = True
    trackers.log(point_at(2))
    trackers.log(point_at(3))
    trackers.finish(outcome(paths, spec, TrialState.COMPLETE, best_step=3))
    (warning,) = trackers.warnings
    assert "503 error responses" in warning
    server.is_down = False
    assert server.history("a_00001", "eval/loss") == [(1, 1.0)]
    again = open_trackers(identify(paths, spec, step=3))
    again.finish(outcome(paths, spec, TrialState.COMPLETE, best_step=3))
    assert server.history("a_00001", "eval/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert server.history("a_00001", "best/eval/loss") == [(3, pytest.approx(1 / 3))]
    assert server.status("a_00001") == "FINISHED"
    assert again.untracked == []


def test_a_missing_package_is_reported_when_the_experiment_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Path(__file__).parents[3] / "experiments" / "demo.yaml"
    overrides = ["tracking.mlflow=true"]
    assert load_spec(demo, overrides).tracking.mlflow
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if the extra were not installed
    load_spec(demo)
    with pytest.raises(Exception, match=r"tracking.mlflow needs the package mlflow") as refused:
        load_spec(demo, overrides)
    assert "pip install 'qlora-orchestrator[mlflow]'" in str(refused.value)


def _runs(paths: TrialPaths) -> list[Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{paths.mlflow / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(paths.sweep.name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def _history(paths: TrialPaths, name: str) -> list[tuple[int, float]]:
    (run,) = _runs(paths)
    client = MlflowClient(tracking_uri=f"sqlite:///{paths.mlflow / 'mlflow.db'}")
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
