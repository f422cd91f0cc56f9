"""The W&B tracker with W&B's own client, against servers on the loopback."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tracked import identify, outcome, point_at

from orchestrator.record import SweepPaths, TrialPaths, TrialState
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.sections.records import WandbSection
from orchestrator.tracking import open_trackers
from orchestrator.tracking import wandb as wandb_tracker
from orchestrator.tracking.wandb import is_online, wandb_fault

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide the settings and keys of the user who runs the tests. The client reads its settings once per process."""
    wandb_tracker._end_service()
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("_ANSWER_S", "_INIT_S", "_FINISH_S", "_END_S"):
        monkeypatch.setattr(wandb_tracker, name, 3)
    yield
    wandb_tracker._end_service()


@pytest.fixture
def paths(tmp_path: Path) -> TrialPaths:
    (tmp_path / "first").mkdir()
    return SweepPaths(tmp_path / "first").trial("a")


@pytest.fixture
def spec(document: dict[str, Any]) -> SweepSpec:
    return parse_spec(document | {"tracking": {"tensorboard": False, "wandb": {"mode": "online"}}})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (401, "rejects the API key: AuthenticationError: "),
        ("hang", "does not answer within 3 s"),
        ("close", "does not answer within 3 s"),
        ("refuse", "does not answer within 3 s"),
    ],
)
def test_a_server_that_cannot_be_used_is_reported_before_the_first_trial(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: int | str, said: str
) -> None:
    address = serve(kind)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    fault = wandb_fault()
    assert time.monotonic() - began < 12
    assert fault is not None
    assert fault.message.startswith(f"tracking.wandb: {address} {said}")
    assert "tracking.wandb.mode: offline" in fault.remedy
    assert KEY not in str(fault)


def test_a_service_that_does_not_end_is_killed(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", serve(401))
    service = wandb_tracker.wandb.setup().ensure_service()._proc._process
    os.kill(service.pid, signal.SIGSTOP)
    began = time.monotonic()
    wandb_tracker._end_service()
    assert 3 <= time.monotonic() - began < 6
    assert service.returncode == -signal.SIGKILL


def test_a_missing_key_is_reported_without_a_prompt(serve: Callable[..., str], monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", serve(401))
    fault = wandb_fault()
    assert fault is not None
    assert fault.message == "tracking.wandb.mode: online needs an API key, and there is none"


def test_auto_is_online_if_there_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ("auto", "online", "offline")
    assert [is_online(WandbSection(mode=mode)) for mode in modes] == [False, True, False]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert [is_online(WandbSection(mode=mode)) for mode in modes] == [True, True, False]


@pytest.mark.parametrize("kind", [401, "hang", "refuse"])
def test_a_server_that_fails_at_the_start_of_a_trial_does_not_stop_it(
    paths: TrialPaths,
    spec: SweepSpec,
    serve: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    kind: int | str,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", serve(kind))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    trackers = open_trackers(identify(paths, spec))
    assert time.monotonic() - began < 15
    (warning,) = trackers.warnings
    assert warning.startswith("W&B failed: CommError: ")
    assert KEY not in warning
    assert trackers.untracked == ["W&B"]


def test_points_that_a_server_missed_are_sent_later(
    paths: TrialPaths, spec: SweepSpec, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_fault() is None
    assert "WANDB_SERVICE" not in os.environ, "child processes start their own service"
    first = open_trackers(identify(paths, spec))
    first.log(point_at(1))
    first.log(point_at(2))
    first.finish(outcome(paths, spec, TrialState.RUNNING, best_step=1))
    assert (first.warnings, wandb_server.steps) == ([], [1, 2])
    lost = open_trackers(identify(paths, spec, step=2))
    wandb_server.is_down = True
    lost.log(point_at(3))
    began = time.monotonic()
    lost.finish(outcome(paths, spec, TrialState.COMPLETE, best_step=1))
    assert time.monotonic() - began < 15
    (warning,) = lost.warnings
    assert warning.startswith("W&B failed: TimeoutError: ")
    assert lost.untracked == ["W&B"]
    still = open_trackers(identify(paths, spec, step=3))
    assert still.warnings[0].startswith("W&B failed: CommError: ")
    wandb_server.is_down = False
    again = open_trackers(identify(paths, spec, step=3))
    again.finish(outcome(paths, spec, TrialState.FAILED, best_step=1))
    assert (again.warnings, again.untracked) == ([], [])
    assert wandb_server.steps == [1, 2, 3], "no point is sent twice"
    assert wandb_server.history[-1]["eval/loss"] == pytest.approx(1 / 3)
    assert wandb_server.exit_codes == [0, 1]
