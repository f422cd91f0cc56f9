"""A real sweep in which trials diverge: what is recorded, printed and learned, and a resume with more trials."""

import math
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import DEMO, TINY

from orchestrator.record import SweepPaths, TrialState, read_sweep

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

SETTINGS = [
    *TINY, "data.max_rows=60", "data.held_out={count: 10}", "training.steps=4", "training.eval_steps=2",
    "training.save_steps=null", "scheduler.kind=none", "search.tied={}", "search.num_trials=2",
    "search.algorithm=optuna", "search.space={training.learning_rate: {loguniform: [1e-4, 1e9]}}",
    "search.first=[{training.learning_rate: 1.0e+9}, {training.learning_rate: 1.0e-3}]",
    "resources={max_concurrent: 1, trials_per_gpu: 1, cpus_per_trial: 1}",
]  # fmt: skip


def orchestrator(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def reported(paths: SweepPaths) -> list[float]:
    """Return the value of each trial that was reported to Optuna, in the order of their draws."""
    with zipfile.ZipFile(paths.tune_snapshot) as snapshot:
        (name,) = [name for name in snapshot.namelist() if name.startswith("searcher-state")]
        study = pickle.loads(snapshot.read(name))["_ot_study"]
    return [trial.value for trial in study.trials]


def test_a_sweep_with_a_diverged_trial_reports_it_and_can_be_resumed_with_more_trials(tmp_path: Path) -> None:
    options = [word for each in SETTINGS for word in ("--set", each)]
    done = orchestrator("sweep", str(DEMO), "--name", "s", "--output", str(tmp_path), *options)
    assert done.returncode == 3, done.stdout + done.stderr
    record = read_sweep(tmp_path / "s")
    best, failed = record.trials()
    assert (best.state, best.config.training.learning_rate) == (TrialState.COMPLETE, 1e-3)
    assert (failed.state, failed.failure) == (TrialState.FAILED, "diverged")
    assert failed.error
    line = f"{failed.trial_id} FAILED at step {failed.step} (diverged): {failed.error.splitlines()[0]}; Try a lower"
    assert done.stdout.count(line) == 2, "once when it failed, once at the end"
    assert f"best of 1 (1 other failed): {best.trial_id}" in done.stdout
    assert reported(record.paths) == [math.inf, best.best and best.best.value]
    assert done.stderr.startswith("error: 1 of 2 trials failed; the best adapter comes from the others")

    done = orchestrator("resume", str(tmp_path / "s"), "--trials", "4", "--budget", "tokens=1_000_000")
    assert done.returncode == 3, done.stdout + done.stderr
    info = read_sweep(tmp_path / "s").info
    trials = record.trials()
    assert len(trials) == info.num_trials == 4
    assert info.spec.search.budget.tokens == 1_000_000
    assert [change.field for change in info.changes] == ["search.num_trials", "search.budget.tokens"]
    assert {each.trial_id for each in (best, failed)} <= {each.trial_id for each in trials}
    assert "has changed since" not in done.stdout
