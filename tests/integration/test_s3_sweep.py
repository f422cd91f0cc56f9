"""A whole sweep whose output is in an S3 bucket: it runs, is interrupted, resumed on another machine, and pulled."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from drivers import assert_complete, command, finished, is_under_way, start_sweep, wait_until
from s3_server import KEY, SECRET, S3Server, s3_server
from tiny import DEMO, TINY

from orchestrator.record import read_sweep
from orchestrator.remote.location import driver_copy

pytestmark = pytest.mark.slow

OUTPUT = "s3://bucket/runs"


def orchestrator(*arguments: str, cache: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command on a machine of its own: with its own copies, in its own folder."""
    environment = os.environ | {"ORCHESTRATOR_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


def test_a_trial_into_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch):
        overrides = [part for each in [*TINY, "training.steps=4"] for part in ("--set", each)]
        machine = {"cache": tmp_path / "machine", "cwd": tmp_path}
        ran = orchestrator("trial", str(DEMO), "--output", OUTPUT, "--name", "t", *overrides, **machine)
        assert ran.returncode == 0, ran.stderr
        best = orchestrator("best", "t", "--output", OUTPUT, cache=tmp_path / "laptop", cwd=tmp_path)
        assert best.returncode == 0, best.stderr
        assert str(tmp_path / "laptop") in best.stdout
        (tmp_path / "machine").rename(tmp_path / "gone")
        again = orchestrator("resume", f"{OUTPUT}/t", **machine)
        assert again.returncode == 0, again.stderr
        assert "is finished; nothing is left to run" in again.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_is_resumed_elsewhere_after_an_outage_and_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "first"))
    with s3_server(monkeypatch) as s3:
        folder = driver_copy(OUTPUT)
        with start_sweep(OUTPUT, "search.algorithm=random") as driver:
            wait_until(folder, driver, lambda trials: any(is_under_way(trial) for trial in trials))
            s3.stop()
            time.sleep(8)  # more than a round
            s3.start()
            wait_until(folder, driver, lambda trials: any(trial.state == "COMPLETE" for trial in trials))
            driver.send_signal(signal.SIGINT)
            printed, errors = driver.communicate(timeout=200)
        assert driver.returncode == 130, errors
        assert f"the sweep is copied to {OUTPUT}/s" in printed
        _take_up_elsewhere(s3, tmp_path)
        _look_from_a_laptop(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert KEY.encode() not in content, path


def _take_up_elsewhere(s3: S3Server, tmp_path: Path) -> None:
    """Resume on a machine that has nothing of the sweep."""
    assert "runs/s/.driver.json" not in s3.names(), "the driver has ended"
    ended = finished(read_sweep(tmp_path / "first" / "drivers" / "s3" / "bucket" / "runs" / "s"))
    (tmp_path / "first").rename(tmp_path / "gone")
    resumed = orchestrator("resume", "s", "--output", OUTPUT, cache=tmp_path / "second", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    record = read_sweep(tmp_path / "second" / "drivers" / "s3" / "bucket" / "runs" / "s")
    assert ended, "a trial has finished before"
    assert_complete(record, {})


def _look_from_a_laptop(tmp_path: Path) -> None:
    laptop = {"cache": tmp_path / "laptop", "cwd": tmp_path}
    status = orchestrator("status", f"{OUTPUT}/s", **laptop)
    assert status.returncode == 0, status.stderr
    assert "5 of 5 trials ended (5 COMPLETE" in status.stdout
    best = orchestrator("best", f"{OUTPUT}/s", "--json", **laptop)
    assert best.returncode == 0, best.stderr
    pulled = orchestrator("pull", f"{OUTPUT}/s", "--to", "mine", **laptop)
    assert pulled.returncode == 0, pulled.stderr
    again = orchestrator("best", "mine", "--export", "adapter", **laptop)
    assert again.returncode == 0, again.stderr
    verified = orchestrator("verify", "adapter", **laptop)
    assert verified.returncode == 0, verified.stderr
