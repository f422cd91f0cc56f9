"""Kill parts of a sweep at random moments, again and again, until it is done. Nothing that was reported is lost.

Each kind is tried with three seeds. So that all take half an hour on two cores, a seed has 7 kills of the driver (21 in
all), 3 of workers, of relays (Tune's actors) and of a mixture, and one of the raylet of a second node.
"""

import random
import time
from pathlib import Path

import psutil
import pytest
from killer import LIMIT_S, Ledger, RunningSweep, Values, check, kill, pause

from orchestrator.record.faults import read_faults

SEEDS = [1, 2, 3]
NUM_DRIVER_KILLS = 7
NUM_KILLS = 3
WORKERS = ("ray::Worker",)
RELAYS = ("ray::TrialTrainable", "ray::ResourceTrainable")

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


@pytest.mark.parametrize("seed", SEEDS)
def test_drivers(tmp_path: Path, undisturbed: dict[float, list[Values]], seed: int) -> None:
    rng, deadline = random.Random(seed), time.monotonic() + LIMIT_S
    sweep, ledger = RunningSweep(tmp_path), Ledger()
    while sweep.record is None:  # before that, no sweep has begun
        assert sweep.driver.poll() is None, sweep.tail()
        time.sleep(0.05)
    for _ in range(NUM_DRIVER_KILLS):
        pause(rng, sweep, deadline)
        if sweep.driver.poll() is None:
            sweep.driver.kill()
            sweep.driver.wait()
            ledger.note(sweep)
        else:
            assert sweep.driver.returncode == 0, sweep.tail()
        sweep.resume()
    code = sweep.finish(deadline)
    assert code == 0, sweep.tail()
    check("driver killed (SIGKILL)", sweep, ledger, undisturbed, losses=1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fault", "names"),
    [("worker killed (SIGKILL)", WORKERS), ("relay killed (SIGKILL)", RELAYS)],
    ids=["workers", "relays"],
)
def test_parts(
    tmp_path: Path, undisturbed: dict[float, list[Values]], seed: int, fault: str, names: tuple[str, ...]
) -> None:
    rng, deadline = random.Random(seed), time.monotonic() + LIMIT_S
    sweep, ledger = RunningSweep(tmp_path), Ledger()
    for _ in range(NUM_KILLS):
        if not sweep.wait_for_points(rng.randint(1, 16), deadline):
            break
        time.sleep(rng.uniform(0, 1))
        if victims := sweep.processes(*names):
            kill(rng.choice(victims))
            ledger.note(sweep)
    code = sweep.finish(deadline)
    assert code == 0, sweep.tail()
    check(fault, sweep, ledger, undisturbed, losses=2)
    assert sweep.record is not None
    assert read_faults(sweep.record.paths), "each restart is recorded"
    assert "; restarts from step " in sweep.output(), "each restart is said"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mixture(tmp_path: Path, undisturbed: dict[float, list[Values]], seed: int) -> None:
    rng, deadline = random.Random(seed), time.monotonic() + LIMIT_S
    sweep, ledger = RunningSweep(tmp_path), Ledger()
    for names in rng.sample([None, WORKERS, RELAYS], k=NUM_KILLS):
        if not sweep.wait_for_points(rng.randint(1, 16), deadline):
            break
        victims = [psutil.Process(sweep.driver.pid)] if names is None else sweep.processes(*names)
        if victims:
            kill(rng.choice(victims))
            ledger.note(sweep)
        if names is None:
            sweep.driver.wait()
            sweep.resume()
    code = sweep.finish(deadline)
    assert code == 0, sweep.tail()
    check("driver, worker and relay killed (SIGKILL)", sweep, ledger, undisturbed, losses=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_raylet_of_a_second_node(
    tmp_path: Path, undisturbed: dict[float, list[Values]], cluster: object, seed: int
) -> None:
    """Its workers and relays die with it; another node takes its place."""
    rng, deadline = random.Random(seed), time.monotonic() + LIMIT_S
    node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")  # type: ignore[attr-defined]
    sweep, ledger = RunningSweep(tmp_path, address=cluster.address), Ledger()  # type: ignore[attr-defined]
    assert sweep.wait_for_points(rng.randint(1, 16), deadline), sweep.tail()
    raylet = node.all_processes["raylet"][0].process
    raylet.kill()
    ledger.note(sweep)
    cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")  # type: ignore[attr-defined]
    code = sweep.finish(deadline)
    assert code == 0, sweep.tail()
    check("raylet of a second node killed (SIGKILL)", sweep, ledger, undisturbed, losses=2)
