"""An interrupted sweep is resumed in the folder where it is now, and writes nowhere else."""

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
from drivers import assert_complete, command, finished, is_under_way, start_sweep, wait_until

from orchestrator.record import TrialState, read_sweep

pytestmark = [pytest.mark.slow, pytest.mark.long]


def contents(folder: Path) -> dict[str, str]:
    """Return the name and hash of every file, and the name of every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def resume(sweep: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        command("resume", sweep), capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "overrides",
    [
        ["search.algorithm=random"],
        ["search.algorithm=optuna"],
        # Medians need every trial's curve: the scheduler's own state must follow the sweep too.
        ["search.algorithm=random", "scheduler={kind: median, grace_steps: 20}"],
    ],
    ids=["random", "optuna", "random-median"],
)
def test_a_copy_leaves_the_original_alone_and_a_moved_sweep_goes_on(tmp_path: Path, overrides: list[str]) -> None:
    with start_sweep(tmp_path / "runs", *overrides) as driver:
        wait_until(tmp_path / "runs", driver, lambda trials: any(is_under_way(trial) for trial in trials))
        driver.send_signal(signal.SIGINT)
        driver.communicate(timeout=120)  # until no worker writes any more
    original = tmp_path / "runs" / "s"
    before = contents(original)
    (tmp_path / "other").mkdir()
    subprocess.run(["cp", "-a", str(original), str(tmp_path / "other" / "copy")], check=True)
    ended = finished(read_sweep(tmp_path / "other" / "copy"))
    copied = resume("other/copy", tmp_path)
    assert copied.returncode == 0, copied.stderr
    assert contents(original) == before, "the copy's trials were written into the original"
    if "median" not in str(overrides):
        assert_complete(read_sweep(tmp_path / "other" / "copy"), ended)
    record = read_sweep(tmp_path / "other" / "copy")
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in record.trials()) == 5

    (tmp_path / "mount").mkdir()
    original.rename(tmp_path / "mount" / "renamed")
    (tmp_path / "link").symlink_to(tmp_path / "mount")
    ended = finished(read_sweep(tmp_path / "mount" / "renamed"))
    moved = resume(str(tmp_path / "link" / "renamed"), tmp_path)
    assert moved.returncode == 0, moved.stderr
    assert not original.exists(), "a folder was made where the sweep lay before"
    record = read_sweep(tmp_path / "mount" / "renamed")
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in record.trials()) == 5
    if "median" not in str(overrides):
        assert_complete(record, ended)
