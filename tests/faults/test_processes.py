"""Stops, hangs, preemptions and signals of single processes; the death of Ray itself; several drivers at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from killer import INTERVAL, LIMIT_S, Ledger, RunningSweep, Values, check, kill
from test_random_kills import WORKERS

from orchestrator.record import read_sweep
from orchestrator.record.faults import read_faults

pytestmark = pytest.mark.timeout(LIMIT_S)

Whole = dict[float, list[Values]]
STOPPED_S = 60.0


def begun(sweep: RunningSweep) -> float:
    """Wait until trials have points, and return the time by which the sweep must have ended."""
    deadline = time.monotonic() + LIMIT_S
    assert sweep.wait_for_points(12, deadline), sweep.tail()
    return deadline


@pytest.mark.parametrize("part", ["driver", "workers"])
def test_processes_that_are_stopped_for_a_minute_lose_nothing(tmp_path: Path, undisturbed: Whole, part: str) -> None:
    sweep, ledger = RunningSweep(tmp_path), Ledger()
    deadline = begun(sweep)
    stopped = [psutil.Process(sweep.driver.pid)] if part == "driver" else sweep.processes(*WORKERS)
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    ledger.note(sweep)
    time.sleep(STOPPED_S)
    for process in stopped:
        process.send_signal(signal.SIGCONT)
    assert sweep.finish(deadline) == 0, sweep.tail()
    check(f"{part} stopped for {STOPPED_S:g} s (SIGSTOP)", sweep, ledger, undisturbed, losses=8)


def test_a_worker_that_hangs_is_ended_and_its_trials_continue(tmp_path: Path, undisturbed: Whole) -> None:
    sweep, ledger = RunningSweep(tmp_path, "resources.hang_minutes=0.7"), Ledger()
    deadline = begun(sweep)
    sweep.processes(*WORKERS)[0].send_signal(signal.SIGSTOP)
    ledger.note(sweep)
    assert sweep.finish(deadline) == 0, sweep.tail()
    check("worker hangs (SIGSTOP for good)", sweep, ledger, undisturbed, losses=2)
    assert "it hangs: no answer for" in sweep.output()
    record = read_sweep(sweep.root)
    assert any(fault.cause.startswith("it hung: no answer for") for fault in read_faults(record.paths))


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_death_of_ray_itself_is_told_and_resumed(tmp_path: Path, undisturbed: Whole, name: str) -> None:
    sweep, ledger = RunningSweep(tmp_path), Ledger()
    deadline = begun(sweep)
    children = psutil.Process(sweep.driver.pid).children()
    (victim,) = [child for child in children if Path(child.cmdline()[0]).name == name]
    kill(victim)
    ledger.note(sweep)
    assert sweep.driver.wait(30) == 69
    assert "error: Ray on this machine has died: its " in sweep.output()
    assert f"Continue with: orchestrator resume {sweep.root}" in sweep.output()
    assert (sweep.root / "driver.log").is_file()
    sweep.resume()
    assert sweep.finish(deadline) == 0, sweep.tail()
    check(f"local {name} killed (SIGKILL)", sweep, ledger, undisturbed, losses=1)


def test_resume_ends_the_processes_of_a_killed_driver(tmp_path: Path, undisturbed: Whole) -> None:
    sweep, ledger = RunningSweep(tmp_path), Ledger()
    deadline = begun(sweep)
    left = psutil.Process(sweep.driver.pid).children(recursive=True)
    sweep.driver.kill()
    sweep.driver.wait()
    ledger.note(sweep)
    assert any(process.is_running() for process in left), "Ray's agents outlive the driver"
    resumed = time.monotonic()
    sweep.resume()
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, [process.cmdline() for process in alive]
    assert time.monotonic() < resumed + 20
    assert sweep.finish(deadline) == 0, sweep.tail()
    check("driver killed, resumed at once", sweep, ledger, undisturbed, losses=1)


@pytest.mark.parametrize("how", ["drain", "SIGTERM"])
def test_trials_on_a_node_that_goes_away_write_checkpoints(
    tmp_path: Path, undisturbed: Whole, cluster: Any, how: str
) -> None:
    node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")
    sweep, ledger = RunningSweep(tmp_path, "training.save_steps=16", address=cluster.address), Ledger()
    deadline = begun(sweep)
    began = time.monotonic()
    if how == "drain":
        options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--node-id", node.node_id]
        ray = Path(sys.executable).parent / "ray"
        drain = [str(ray), "drain-node", "--address", cluster.address, *options, "--deadline-remaining-seconds", "60"]
        done = subprocess.run(drain, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        (worker,) = [child for child in raylet.children() if child.cmdline()[0].startswith("ray::Worker")]
        worker.send_signal(signal.SIGTERM)
    ledger.kills += 1
    words = "its node is about to go away" if how == "drain" else "its process got SIGTERM"
    paths = read_sweep(sweep.root).paths
    while not any(fault.trial_id and words in fault.cause for fault in read_faults(paths)):
        assert time.monotonic() < began + 40, (read_faults(paths), sweep.tail())
        time.sleep(0.1)
    fault = next(fault for fault in read_faults(paths) if fault.trial_id and words in fault.cause)
    assert fault.step is not None
    assert fault.step % INTERVAL or fault.step not in (0, 16), "a checkpoint of the last step, not of the interval"
    if how == "drain":
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
    assert sweep.finish(deadline) == 0, sweep.tail()
    check(f"node goes away ({how})", sweep, ledger, undisturbed, losses=0)
    assert all(trial.error is None for trial in read_sweep(sweep.root).trials())


def test_two_drivers_on_one_sweep(tmp_path: Path, undisturbed: Whole) -> None:
    sweep, ledger = RunningSweep(tmp_path), Ledger()
    deadline = begun(sweep)
    command = [sys.executable, "-m", "orchestrator.cli", "resume", str(sweep.root)]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another process is running this sweep" in second.stderr
    ledger.note(sweep)
    assert sweep.finish(deadline) == 0, sweep.tail()
    check("second driver on a sweep", sweep, ledger, undisturbed, losses=8)


def test_two_sweeps_on_one_ray_with_one_output(tmp_path: Path, undisturbed: Whole, cluster: Any) -> None:
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")
    settings, ledger = ["resources.max_concurrent=1"], Ledger(kills=1)
    sweeps = [RunningSweep(tmp_path, *settings, address=cluster.address, name=name) for name in ("one", "other")]
    time.sleep(1)
    third = RunningSweep(tmp_path, *settings, address=cluster.address, name="one")
    assert third.driver.wait(120) == 2, "the name is taken"
    for sweep in sweeps:
        assert sweep.finish(time.monotonic() + LIMIT_S) == 0, sweep.tail()
        check("two sweeps on one Ray, one output", sweep, ledger, undisturbed, losses=0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one", "other"]
    assert os.environ.get("RAY_AUTH_TOKEN")
