"""The command line with trackers whose servers refuse the key, fail and come back."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import MlflowServer, Serve, serving
from tiny import DEMO, TINY

from orchestrator.record import TrialState, read_sweep

pytestmark = pytest.mark.slow

SETTINGS = [*TINY, "search.num_trials=2", "scheduler.kind=none", "training.steps=8", "resources.max_concurrent=2"]
PASSWORD = "s3c@r:et/"
LOGIN = "alice:s3c%40r%3Aet%2F"


@pytest.fixture
def serve() -> Iterator[Serve]:
    with serving() as start:
        yield start


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", name, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def new(folder: Path, *settings: str) -> list[str]:
    options = [part for setting in [*SETTINGS, *settings] for part in ("--set", setting)]
    return [str(DEMO), "--output", str(folder), "--name", "s", *options]


@pytest.mark.parametrize("command", ["trial", "sweep"])
def test_a_rejected_key_ends_the_command_within_seconds_and_nothing_is_written(
    tmp_path: Path, serve: Serve, command: str
) -> None:
    began, key = time.monotonic(), "0123456789abcdef0123456789abcdef01234567"
    refused = run(
        command,
        *new(tmp_path, "tracking.wandb.mode=online"),
        WANDB_BASE_URL=serve(401),
        WANDB_API_KEY=key,
        HOME=str(tmp_path / "home"),
    )
    assert time.monotonic() - began < 60, "a few seconds, with a margin for a busy machine"
    assert refused.returncode == 2, refused.stderr
    assert "tracking.wandb: http://127.0.0.1:" in refused.stderr
    assert "rejects the API key" in refused.stderr
    assert "tracking.wandb.mode: offline" in refused.stderr
    assert key not in refused.stdout + refused.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.long
def test_a_server_that_fails_during_a_sweep_stops_no_trial_and_resume_sends_the_missing_records(
    tmp_path: Path, serve: Serve
) -> None:
    server = MlflowServer("alice", PASSWORD)
    server.answers_left = 1  # it answers once, before the first trial
    address = serve(server.answer).replace("http://", f"http://{LOGIN}@")
    ran = run("sweep", *new(tmp_path, "tracking.mlflow=true"), MLFLOW_TRACKING_URI=address)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("warning: MLflow failed: ") == 1, ran.stdout
    assert "warning: MLflow is missing records of 2 trials: " in ran.stdout
    assert server.runs == {}
    trials = read_sweep(tmp_path / "s").trials()
    assert [(trial.state, trial.untracked) for trial in trials] == [(TrialState.COMPLETE, ["MLflow"])] * 2
    server.answers_left = None
    resumed = run("resume", str(tmp_path / "s"), MLFLOW_TRACKING_URI=address)
    assert resumed.returncode == 0, resumed.stderr
    assert "MLflow has received the missing records of 2 trials" in resumed.stdout
    for trial in read_sweep(tmp_path / "s").trials():
        assert trial.untracked == []
        assert server.status(trial.trial_id) == "FINISHED"
        assert [step for step, _ in server.history(trial.trial_id, "eval/loss")] == [4, 8]
        assert trial.best is not None
        (best,) = server.history(trial.trial_id, "best/eval/loss")
        assert best == (trial.best.step, pytest.approx(trial.best.value))
    printed = [ran.stdout, ran.stderr, resumed.stdout, resumed.stderr]
    written = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in printed + written if PASSWORD in text or LOGIN in text]
