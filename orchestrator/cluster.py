"""Connect to Ray, or start it here; and make sure that all its nodes see the same output folder."""

import logging
import os
import secrets
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError, RequestError, StorageError
from orchestrator.signals import shielding_children
from orchestrator.storage import storage_fault

# A node starts a worker and imports this module to answer. Storage that hangs never answers.
_ANSWER_TIMEOUT_S = 120.0


@contextmanager
def connection(address: str | None) -> Iterator[None]:
    """Ray for the time of a sweep: the cluster at `address` (`auto` finds it), or a fresh local one.

    Raises:
        ClusterError: there is no cluster at that address.
    """
    if address is None:
        _prepare_local()
    import ray

    if ray.is_initialized():  # the caller's own connection
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        with shielding_children():
            if address is None:
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                _require_listener(address)
                with _one_attempt():
                    ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address is None:
            raise ClusterError(f"Ray cannot be started on this machine: {error}") from error
        raise ClusterError(
            f"Ray at {address} cannot be reached: {error}",
            "Start a cluster with `ray up cluster.yaml` or `ray start --head`, or leave --address out. "
            "One that asks for a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too.",
        ) from error
    try:
        yield
    finally:
        if address is None:
            _kill_at_shutdown()
        ray.shutdown()


def require_shared_folder(folder: Path) -> None:
    """Write and read a probe under `folder` on every node. Nothing of it stays, a folder made for it neither.

    Raises:
        RequestError: `folder` cannot be written on this machine.
        StorageError: its disk is full or fails.
        ClusterError: names the nodes that do not see what this machine wrote, or whose writing is not seen here.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    with _probe_folder(folder) as probe:
        task = ray.remote(num_cpus=0, max_retries=0)(_answer_probe)
        answers = {
            node_id: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
                str(probe), node_id
            )
            for node_id in nodes
        }
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_TIMEOUT_S)
        faults = {node_id: _fault(answer, probe / node_id) for node_id, answer in answers.items()}
    named = [f"node {_name_node(nodes[node_id])} {fault}" for node_id, fault in faults.items() if fault]
    if named:
        raise ClusterError(
            f"output {folder} is not shared: {'; '.join(sorted(named))}",
            "Give --output a folder on storage that every node mounts at the same path.",
        )


def _answer_probe(probe: str, node_id: str) -> None:
    """On a node: write a file if it sees the driver's."""
    if (Path(probe) / "driver").is_file():
        (Path(probe) / node_id).write_text(node_id)


def _fault(answer: Any, written: Path) -> str | None:
    """Tell what is wrong with a node, by its answer and by whether its file is seen here.

    Raises:
        StorageError: its disk is full or fails.
    """
    import ray

    try:
        ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return f"has not answered in {_ANSWER_TIMEOUT_S:g} s"
    except ray.exceptions.RayError as error:  # it died, may not write there, or has not this package
        if fault := storage_fault(error):
            raise StorageError(
                f"{written.parent.parent}: its storage fails: {fault}", "Make room or mend it."
            ) from error
        return f"failed: {str(error).strip().splitlines()[-1]}"
    return None if written.is_file() else "sees another folder of that name"


def _name_node(node: dict[str, Any]) -> str:
    """As `ray list nodes` names it; nodes on one machine may differ in nothing but the id."""
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, id {node['NodeID'][:8]})"


@contextmanager
def _probe_folder(folder: Path) -> Iterator[Path]:
    """A new folder under `folder` that holds a file `driver`; removed again, with all that had to be made for it."""
    missing: list[Path] = []
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        try:
            missing += [path for path in (folder, *folder.parents) if not path.exists()]
            probe.mkdir(parents=True)
            (probe / "driver").write_text("driver")
        except OSError as error:
            if fault := storage_fault(error):
                raise StorageError(f"output {folder}: its storage fails: {fault}", "Make room or mend it.") from error
            raise RequestError(
                f"output {folder}: cannot be written: {error}", "Give --output a folder that you may write to."
            ) from error
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for path in missing:
            with suppress(OSError):  # another sweep has begun in it meanwhile
                path.rmdir()


def _require_listener(address: str) -> None:
    """Tell at once if nothing listens at HOST:PORT, where Ray would wait. Where `auto` leads, only Ray knows."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "://" in host or not port.isdecimal():
            raise ValueError("an address is auto or HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _one_attempt() -> Iterator[None]:
    """Let Ray try an address once, 40 s; it tries one that does not answer 20 times (`Node._init_gcs_client`)."""
    name = "RAY_gcs_server_port_wait_time_s"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"  # counts attempts
    try:
        yield
    finally:
        del os.environ[name]


def _kill_at_shutdown() -> None:
    """Have Ray end its own processes by SIGKILL: it would wait a second for each to heed SIGTERM, which none does here.

    See `shielding_children`. They hold nothing that outlives the sweep.
    """
    from ray._private import worker

    node = worker._global_node
    if node is not None:
        kill = node.kill_all_processes
        node.kill_all_processes = lambda **_: kill(check_alive=False, allow_graceful=False)


def _prepare_local() -> None:
    """Settings of a local Ray, for what the user has not set."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A fresh local Ray asks for a token of its clients and writes one into the home folder if there is none. This one
    # lives as long as the sweep, in the environment that its processes inherit.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray").setLevel(logging.ERROR)  # ray.init warns that token authentication is on
