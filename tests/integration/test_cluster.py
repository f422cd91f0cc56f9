"""Sweeps on Ray clusters of two and three nodes on this machine, and what is refused before a sweep."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from orchestrator.cluster import connection, require_shared_folder
from orchestrator.deploy import FinishedSweep
from orchestrator.errors import ClusterError, RequestError
from orchestrator.record import SweepPaths, TrialResult, TrialState
from orchestrator.spec import SweepSpec
from orchestrator.sweep import run_sweep
from orchestrator.sweep.workers import placement

pytestmark = [pytest.mark.slow, pytest.mark.long]

Tiny = Callable[..., SweepSpec]

DEMO = Path(__file__).parents[2] / "experiments" / "demo.yaml"
BIN = Path(sys.executable).parent
SHORT = [
    "search.num_trials=4",
    "training.steps=4",
    "training.eval_steps=2",
    "scheduler={kind: asha, grace_steps: 2, reduction_factor: 2}",
]
ONE_EACH = ["resources.gpus_per_trial=0", "resources.trials_per_gpu=1"]
"""Settings with which one trial fills a worker: the next trial waits for the worker that opens later."""
SECOND, BLIND, ELSEWHERE = "127.0.0.2", "127.0.0.3", "127.0.0.4"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Return the address of a cluster of two nodes, each with resources for one trial."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, node_ip_address=SECOND)
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def blind_node(address: str, folder: Path, log: Path) -> Iterator[int]:
    """Start a third node that sees another folder at the path `folder`, and yield its process id."""
    folder.mkdir(parents=True)
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]
    allowed = subprocess.run([*hide, "true"], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"a mount namespace of its own is not permitted here: {allowed.stderr.strip()}")
    with log.open("wb") as output:
        process = subprocess.Popen([*hide, *start_node(address, BLIND)], stdout=output, stderr=output)
    try:
        yield process.pid
    finally:
        process.terminate()  # it ends the node's processes
        process.wait(60)


@contextmanager
def node_elsewhere(address: str, folder: Path) -> Iterator[None]:
    """Start a third node with another working folder than the driver and the other nodes."""
    folder.mkdir()
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(start_node(address, ELSEWHERE), cwd=folder, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def start_node(address: str, ip: str) -> list[str]:
    """Return the command that starts another node with one core."""
    start = [str(BIN / "ray"), "start", "--block", "--address", address, "--node-ip-address", ip, "--num-cpus", "1"]
    return [*start, "--object-store-memory", str(100 * 1024**2), "--min-worker-port", "0", "--max-worker-port", "0"]


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Return a set that holds the node and working folder of each worker after a sweep."""
    import ray

    from orchestrator.sweep.workers.fleet import Fleet

    found: set[tuple[str, str]] = set()
    ends = Fleet.end

    def end(self: Fleet) -> None:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        found.update(ray.get([handle.__ray_call__.remote(place) for handle in self._handles]))
        ends(self)

    monkeypatch.setattr(Fleet, "end", end)
    return found


def place(_: object) -> tuple[str, str]:
    """Return node and working folder. Runs in a worker."""
    import ray

    return ray.util.get_node_ip_address(), str(Path.cwd())


def ignore(trials: list[TrialResult]) -> None:
    """Ignore progress."""


def wait_for(node: str, alive: bool) -> None:
    import ray

    deadline = time.monotonic() + 60
    while not any(n["NodeManagerAddress"] == node and n["Alive"] == alive for n in ray.nodes()):
        assert time.monotonic() < deadline, f"{node} did not become {'alive' if alive else 'dead'}: {ray.nodes()}"
        time.sleep(0.2)


def orchestrator(*arguments: str, home: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, with a new home folder."""
    home.mkdir()
    return subprocess.run(
        [str(BIN / "orchestrator"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=_user_environment() | {"HOME": str(home)},
    )


def _user_environment() -> dict[str, str]:
    """Return the environment without the Ray settings of this test process."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_"))}


def test_sweep_runs_on_all_nodes(address: str, tiny: Tiny, folder: SweepPaths, places: set[tuple[str, str]]) -> None:
    record = run_sweep(tiny(*SHORT, *ONE_EACH), folder, ignore, address=address)

    trials = record.trials()
    assert len(trials) == 4
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.STOPPED}
    assert FinishedSweep(record).best().adapter.is_dir()
    assert {node for node, _ in places} == {address.partition(":")[0], SECOND}
    assert len({trial.worker for trial in trials}) == 2, "each node has trained"
    assert {path.name for path in folder.root.parent.iterdir()} == {folder.name}  # no probe is left


def test_nodes_with_other_working_folders(
    address: str, tiny: Tiny, folder: SweepPaths, places: set[tuple[str, str]], tmp_path: Path
) -> None:
    with connection(address), node_elsewhere(address, tmp_path / "elsewhere"):
        wait_for(ELSEWHERE, alive=True)
        record = run_sweep(tiny(*SHORT, "search.num_trials=6", *ONE_EACH), folder, ignore, address=address)
    assert (ELSEWHERE, str(tmp_path / "elsewhere")) in places
    assert len({node for node, _ in places}) == 3
    trials = record.trials()
    assert len(trials) == 6
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.STOPPED}
    assert len({trial.worker for trial in trials}) == 3, "each node has trained"
    assert list((tmp_path / "elsewhere").iterdir()) == [tmp_path / "elsewhere" / "log"], (
        "a worker wrote into its working folder"
    )
    with connection(address):
        wait_for(ELSEWHERE, alive=False)


def test_a_sweep_says_what_it_waits_for_on_a_busy_cluster(
    address: str, tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_PATIENCE_S", 2.0)
    monkeypatch.setattr(placement, "_PERIOD_S", 1.0)
    said: list[str] = []
    with connection(address):
        others = [ray.remote(num_cpus=1)(Busy).remote() for _ in range(2)]
        ray.get([other.__ray_ready__.remote() for other in others])

        def say(sentence: str) -> None:
            said.append(sentence)
            if sentence.startswith("waiting"):
                for other in others:
                    ray.kill(other)

        record = run_sweep(tiny(*SHORT, *ONE_EACH), folder, ignore, address=address, say=say)
    waiting = [sentence for sentence in said if sentence.startswith("waiting")]
    assert waiting[0] == (
        "waiting for the cluster: 0 of 2 workers started; each takes 1 CPU core on one node; free now: 0 of 2 CPU cores"
    )
    assert len(record.finished()) == 4


class Busy:
    """An actor of another user, which takes a core."""


def test_a_cluster_without_gpus_is_refused_if_gpus_are_auto(address: str, tiny: Tiny, folder: SweepPaths) -> None:
    with pytest.raises(RequestError, match="has no GPU at this moment"):
        run_sweep(tiny(), folder, ignore, address=address)
    assert not folder.root.exists()


def test_node_with_another_folder_is_named_and_nothing_is_written(
    address: str, tiny: Tiny, folder: SweepPaths, tmp_path: Path
) -> None:
    output = folder.root.parent
    with connection(address), blind_node(address, output, tmp_path / "node.log") as node:
        wait_for(BLIND, alive=True)
        with pytest.raises(ClusterError) as refused:
            run_sweep(tiny("resources.gpus_per_trial=0"), folder, ignore, address=address)
        assert f"output {output} is not shared: node {BLIND} (" in refused.value.message
        assert "sees another folder of that name" in refused.value.message
        assert refused.value.message.count("node ") == 1  # the others are not blamed
        assert list(output.iterdir()) == []
        assert list(Path(f"/proc/{node}/root/{output}").iterdir()) == []  # as the node sees it

    with connection(address):
        wait_for(BLIND, alive=False)
        require_shared_folder(output)  # the dead are not asked
    assert list(output.iterdir()) == []


def test_the_probe_removes_folders_that_it_made(address: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with connection(address):
        require_shared_folder(tmp_path / "there" / "new" / "runs")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_output_that_cannot_be_written_is_refused(address: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with connection(address), pytest.raises(RequestError, match=f"{tmp_path}/file/runs: cannot be written"):
        require_shared_folder(tmp_path / "file" / "runs")


@pytest.mark.parametrize("nowhere", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1", "127.0.0.1:http"])
def test_an_address_without_a_cluster_is_refused_at_once(nowhere: str) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=f"Ray at {nowhere} cannot be reached"), connection(nowhere):
        pass
    assert time.monotonic() - began < 5


def test_sweep_at_an_address_without_a_cluster(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    said = orchestrator("sweep", str(DEMO), "--address", "127.0.0.1:1", "--output", str(runs), home=tmp_path / "home")
    assert said.returncode == 1
    assert "error: Ray at 127.0.0.1:1 cannot be reached" in said.stderr
    assert "ray start --head" in said.stderr
    assert "Traceback" not in said.stderr + said.stdout
    assert not runs.exists()


def test_address_that_is_not_ray_is_given_up() -> None:
    """Ray would try 20 times for 40 s each, which is lowered to 3 s here."""
    with socket.create_server(("", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        code = f"from orchestrator.cluster import connection\nwith connection({address!r}): pass"
        environment = {"RAY_py_gcs_connect_timeout_s": "1", "RAY_gcs_rpc_server_connect_timeout_s": "1"}
        said = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=30,
            env=_user_environment() | environment,
        )
    assert f"ClusterError: Ray at {address} cannot be reached" in said.stderr


def _run_python(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=_user_environment() | {"HOME": str(home)},
    )


def test_local_ray_writes_nothing_at_home_and_shares_its_folder(tmp_path: Path) -> None:
    home, output = tmp_path / "home", tmp_path / "new" / "runs"
    home.mkdir()
    code = (
        "from pathlib import Path\n"
        "from orchestrator.cluster import connection, require_shared_folder\n"
        "with connection(None):\n"
        f"    require_shared_folder(Path({str(output)!r}))\n"
        "    print('shared')"
    )
    said = _run_python(code, home)
    assert said.stdout == "shared\n", said.stderr
    assert said.stderr == ""
    assert list(home.rglob("*")) == []
    assert not output.parent.exists()


def test_a_local_ray_listens_on_the_loopback_interface_only(tmp_path: Path) -> None:
    code = (
        "import psutil, ray\n"
        "from orchestrator.cluster import connection\n"
        "with connection(None):\n"
        "    ray.get(ray.remote(lambda: None).remote())\n"
        "    own = psutil.Process()\n"
        "    for process in [own, *own.children(recursive=True)]:\n"
        "        for each in process.net_connections('tcp'):\n"
        "            if each.status == 'LISTEN':\n"
        "                print(each.laddr.ip.removeprefix('::ffff:'))\n"
    )
    said = _run_python(code, tmp_path)
    addresses = said.stdout.split()
    assert len(addresses) > 5, said.stderr  # of the driver, the GCS, the raylet, its agent and workers
    assert set(addresses) == {"127.0.0.1"}


def test_sweep_with_bad_data_writes_nothing(tmp_path: Path) -> None:
    rows, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n' * 8 + '{"question": "2 + 2?"}\n')
    bad = ["--set", f"data.source={rows}", "--set", "data.held_out={count: 2}"]
    said = orchestrator("sweep", str(DEMO), *bad, "--output", str(runs), home=tmp_path / "home")
    assert said.returncode == 2, said.stderr
    assert "answer" in said.stderr  # an error of the rows, found after the probe
    assert "Traceback" not in said.stderr + said.stdout
    assert not runs.exists()
    assert not (tmp_path / "home" / ".ray").exists()
