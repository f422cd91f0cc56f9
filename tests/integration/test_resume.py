"""A sweep that loses its driver or a worker continues, and finished trials stay as they were."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from drivers import STEPS, assert_complete, command, finished, is_under_way, start_sweep, wait_until_in_the_middle
from tiny import DEMO, TINY

from orchestrator.record import TrialState, read_sweep

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "overrides",
    [
        ["search.algorithm=auto"],
        ["search.algorithm=optuna"],
        # Only rows of full length would reach this rung: all trials run to their end, and the scheduler processes the
        # ended ones again after the resume.
        ["search.algorithm=random", f"scheduler={{kind: asha, grace_tokens: {(STEPS - 4) * 8 * 64}}}"],
    ],
    ids=["auto", "optuna", "random-asha"],
)
def test_driver_is_killed_and_the_sweep_resumed(tmp_path: Path, overrides: list[str]) -> None:
    with start_sweep(tmp_path, *overrides) as driver:
        record = wait_until_in_the_middle(tmp_path, driver)
        driver.send_signal(signal.SIGKILL)
    for torn in record.paths.tune.glob("searcher-state-*.pkl"):  # as after a kill while Tune copies it
        torn.write_bytes(b"")
    if "search.algorithm=optuna" in overrides:
        record.paths.tune_snapshot.write_bytes(b"")  # the state before it is restored
    (record.paths.tune / "tuner.pkl").write_bytes(b"")  # as after a kill at the start of an earlier resume
    before = finished(record)
    configs = {trial.trial_id: trial.config for trial in record.trials()}
    assert before
    resumed = subprocess.run(command("resume", str(tmp_path / "s")), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert ("the search continues from the state before it" in resumed.stdout) == (
        "search.algorithm=optuna" in overrides
    )
    assert "best of 5" in resumed.stdout
    assert_complete(record, before)
    after = {trial.trial_id: trial.config for trial in record.trials()}
    assert all(after[trial_id] == config for trial_id, config in configs.items())


def test_ctrl_c_keeps_results_and_says_how_to_resume(tmp_path: Path) -> None:
    with start_sweep(tmp_path) as driver:
        record = wait_until_in_the_middle(tmp_path, driver)
        driver.send_signal(signal.SIGINT)
        _, message = driver.communicate(timeout=120)
    assert driver.returncode == 130
    assert f"orchestrator resume {tmp_path / 's'}" in message
    assert "Traceback" not in message
    before = finished(record)
    assert before
    states = {trial.state for trial in record.trials()}
    assert states <= {TrialState.COMPLETE, TrialState.RUNNING, TrialState.PENDING}, states
    resumed = subprocess.run(command("resume", str(tmp_path / "s")), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_complete(record, before)


def test_ctrl_c_of_a_single_trial(tmp_path: Path) -> None:
    options = [part for setting in [*TINY, "training.steps=200"] for part in ("--set", setting)]
    arguments = ["trial", str(DEMO), "--output", str(tmp_path), "--name", "t", *options]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trial:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "t").glob("trials/*/checkpoints/checkpoint-8")) and time.monotonic() < deadline:
            assert trial.poll() is None, trial.communicate()
            time.sleep(0.05)
        trial.send_signal(signal.SIGINT)
        _, message = trial.communicate(timeout=60)
    assert trial.returncode == 130, message
    assert f"orchestrator resume {tmp_path / 't'}" in message
    assert "Traceback" not in message
    (interrupted,) = read_sweep(tmp_path / "t").trials()
    assert (interrupted.state, interrupted.error) == (TrialState.RUNNING, None)
    assert interrupted.checkpoint is not None


def test_worker_is_killed_and_its_trial_continues_from_its_checkpoint(tmp_path: Path) -> None:
    with start_sweep(tmp_path) as driver:
        record = wait_until_in_the_middle(tmp_path, driver)
        victim = next(trial for trial in record.trials() if is_under_way(trial))
        assert victim.worker is not None
        os.kill(int(victim.worker.rpartition(":")[2]), signal.SIGKILL)
        output, message = driver.communicate(timeout=240)
    assert driver.returncode == 0, message
    assert "best of 5" in output
    assert_complete(record, {})
    again = next(trial for trial in record.trials() if trial.trial_id == victim.trial_id)
    assert again.worker != victim.worker


def test_a_trial_that_fails_by_itself_does_not_stop_the_sweep(tmp_path: Path) -> None:
    with start_sweep(
        tmp_path,
        "search={algorithm: grid}",
        "search.space.training.learning_rate={grid: [1e-3, 1e30]}",
        "training.max_grad_norm=0",
        "training.steps=4",
    ) as driver:
        output, message = driver.communicate(timeout=240)
    assert driver.returncode == 3, message
    good, bad = read_sweep(tmp_path / "s").trials()
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.FAILED)
    assert "at step" in (bad.error or "")
    assert "best of 1" in output


def test_a_sweep_of_failures_fails(tmp_path: Path) -> None:
    with start_sweep(tmp_path, "search={algorithm: grid}", "lora.rank_pattern={nowhere: 4}") as driver:
        _, message = driver.communicate(timeout=240)
    assert driver.returncode == 1
    assert "lora.rank_pattern: 'nowhere' matches no adapted layer" in message
    assert f"logs: {tmp_path / 's' / 'workers'}" in message
    assert list((tmp_path / "s" / "workers").glob("*.log"))
    assert "Traceback" not in message
