"""Passwords and keys of the environment are in nothing that a sweep leaves, prints or shows in the process list."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from loopback import MlflowServer, Serve, serving
from tiny import DEMO, TINY

from orchestrator.record import TrialState, read_sweep

pytestmark = pytest.mark.slow

PASSWORD = "pl4nted-mlflow-pass/word"
ENCODED = "pl4nted-mlflow-pass%2Fword"
KEYS = {
    "HF_TOKEN": "hf_pl4ntedHubToken0123456789",
    "WANDB_API_KEY": "pl4nted0wandb0123456789abcdef01234567890",
    "AWS_ACCESS_KEY_ID": "AKIAPL4NTED012345678",
    "AWS_SECRET_ACCESS_KEY": "pl4nted/aws+secret/0123456789abcdefghijkl",
    "AWS_SESSION_TOKEN": "pl4nted-session-token-0123456789",
    "ORCHESTRATOR_STATE_KEY": "pl4nted-state-key-0123456789abcdef0123",
}
STORE = "s3://pl4nted-user:pl4nted-store-secret@bucket/models"  # in a variable whose name does not say so
METRIC = f"""
import os

def leaky(prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
    if len(prompts) > 1:  # the check before the first trial passes one row
        names = {["MODEL_STORE", *KEYS, "MLFLOW_TRACKING_URI"]}
        raise RuntimeError("cannot reach " + " ".join(os.environ[name] for name in names))
    return [1.0]
"""
SETTINGS = [
    *TINY, "tracking.wandb.mode=offline", "tracking.mlflow=true", "search.num_trials=2", "scheduler.kind=none",
    "training.steps=4", "training.eval_steps=2", "training.save_steps=2", "resources.max_concurrent=2",
    "resources.max_failures=0",
]  # fmt: skip


@pytest.fixture
def serve() -> Iterator[Serve]:
    with serving() as start:
        yield start


def planted() -> list[bytes]:
    secrets = [*KEYS.values(), PASSWORD, ENCODED, "pl4nted-store-secret"]
    return [secret.encode() for secret in secrets]


def processes(root: psutil.Process) -> list[str]:
    """Return the command lines of a process and of all that it has started."""
    lines = []
    for process in [root, *root.children(recursive=True)]:
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:  # it has just ended
            continue
    return lines


@pytest.mark.parametrize("command", ["trial", "sweep"])
def test_planted_keys_are_nowhere(tmp_path: Path, serve: Serve, command: str) -> None:
    server = MlflowServer("alice", PASSWORD)
    address = serve(server.answer).replace("http://", f"http://alice:{ENCODED}@")
    metric = tmp_path / "metric.py"
    metric.write_text(METRIC)
    settings = [*SETTINGS, f"evaluation.metrics=['{metric}:leaky']"]
    options = ["--name", "s", *(part for setting in settings for part in ("--set", setting))]
    environment = KEYS | {"MLFLOW_TRACKING_URI": address, "MODEL_STORE": STORE, "HOME": str(tmp_path / "home")}
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", command, str(DEMO), "--output", str(tmp_path), *options],
            env=os.environ | environment, stdout=said, stderr=said,
        )  # fmt: skip
        lines: set[str] = set()
        while driver.poll() is None:
            lines |= set(processes(psutil.Process(driver.pid)))
            time.sleep(0.2)
    assert driver.returncode == 1, (tmp_path / "said").read_text()
    trials = read_sweep(tmp_path / "s").trials()
    assert trials
    assert all(trial.state == TrialState.FAILED for trial in trials)
    assert all("cannot reach s3://***@bucket" in (trial.error or "") for trial in trials), trials[0].error
    assert len(lines) > 0
    found = {f"process: {line}" for line in lines for secret in planted() if secret.decode() in line}
    for file in tmp_path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            found |= {f"{file}: {secret.decode()}" for secret in planted() if secret in content}
    assert not found, "\n".join(sorted(found))
