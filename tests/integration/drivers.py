"""Run sweeps from the command line in separate processes, to interrupt and resume them."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny import DEMO, TINY

from orchestrator.record import SweepRecord, TrialResult, TrialState, read_metrics, read_sweep

NUM_TRIALS = 5
STEPS = 24


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", *arguments]


def start_sweep(folder: Path | str, *overrides: str) -> subprocess.Popen[str]:
    settings = [
        *TINY,
        f"search.num_trials={NUM_TRIALS}",
        f"training.steps={STEPS}",
        "training.eval_steps=4",
        "scheduler.kind=none",
        "resources.max_concurrent=4",  # the fifth begins once one has ended
        *overrides,
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["sweep", str(DEMO), "--output", str(folder), "--name", "s", *options]
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_in_the_middle(folder: Path, driver: subprocess.Popen[str]) -> SweepRecord:
    """Wait until one trial has finished, and another has a checkpoint and is still running."""
    return wait_until(
        folder,
        driver,
        lambda trials: any(t.state == TrialState.COMPLETE for t in trials) and any(is_under_way(t) for t in trials),
    )


def wait_until(
    folder: Path, driver: subprocess.Popen[str], condition: Callable[[list[TrialResult]], bool]
) -> SweepRecord:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()
        if (folder / "s" / "sweep.json").is_file():
            record = read_sweep(folder / "s")
            if condition(record.trials()):
                return record
        time.sleep(0.05)
    raise AssertionError("the sweep has not come so far within 300 s")


def is_under_way(trial: TrialResult) -> bool:
    return trial.state == TrialState.RUNNING and trial.checkpoint is not None and trial.step < STEPS - 6


def assert_complete(record: SweepRecord, finished_before: dict[Path, int]) -> None:
    """Check that all trials are complete, each step is recorded once, and finished trials were not touched."""
    complete = [trial for trial in record.trials() if trial.state == TrialState.COMPLETE]
    others = [trial for trial in record.trials() if trial.state != TrialState.COMPLETE]
    assert len(complete) == NUM_TRIALS
    assert all(trial.state == TrialState.CANCELLED for trial in others), others
    for trial in complete:
        points = read_metrics(record.paths.trial(trial.trial_id))
        steps = [point.step for point in points if "eval/loss" in point.values]
        assert steps == list(range(4, STEPS + 1, 4))
        assert trial.step == STEPS
        assert trial.tokens == points[-1].tokens
    for path, changed in finished_before.items():
        assert path.stat().st_mtime_ns == changed, "a finished trial was run again"


def finished(record: SweepRecord) -> dict[Path, int]:
    results = [record.paths.trial(trial_id).result for trial_id in record.paths.trial_ids()]
    return {path: path.stat().st_mtime_ns for path in results if path.is_file()}
