"""Connect to a Ray cluster or start a local one, and check that all its nodes share the output folder."""

import logging
import os
import secrets
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError, RequestError, StorageError
from orchestrator.ray_watch import watching_local_ray
from orchestrator.record.lock import marking_children
from orchestrator.signals import shielding_children
from orchestrator.storage import storage_fault
from orchestrator.upstream import CONNECTION_ATTEMPTS_VARIABLE, kill_ray_processes_at_shutdown, loopback_only

_ANSWER_TIMEOUT_S = 120.0
"""Time to answer the probe: a node starts a process and imports this module. Storage that hangs never answers."""


@contextmanager
def connection(address: str | None) -> Iterator[None]:
    """Connect to Ray for the time of a sweep.

    Args:
        address: address of a cluster, HOST:PORT, or `auto` to find it; None starts Ray on this machine.

    Raises:
        ClusterError: there is no cluster at that address, or Ray cannot be started.
    """
    if address is None:
        _prepare_local()
    import ray

    if ray.is_initialized():  # the caller has connected already
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        with shielding_children():
            if address is None:
                with marking_children(), loopback_only() as own_address:
                    ray.init(address="local", include_dashboard=False, _node_ip_address=own_address, **quiet)
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
            "A cluster that requires a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too.",
        ) from error
    try:
        with watching_local_ray() if address is None else nullcontext():
            yield
    finally:
        if address is None:
            kill_ray_processes_at_shutdown()  # they ignore SIGTERM, see `shielding_children`
        ray.shutdown()


def require_shared_folder(folder: Path) -> None:
    """Write and read a probe under `folder` on every node, and remove it with all folders that were made for it.

    Raises:
        RequestError: `folder` cannot be written on this machine.
        StorageError: the disk of `folder` is full or fails.
        ClusterError: some nodes do not see the file that this machine wrote, or this machine does not see theirs; the
            message names these nodes.
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
    """Write a file if the driver's file is visible. Runs on each node."""
    if (Path(probe) / "driver").is_file():
        (Path(probe) / node_id).write_text(node_id)


def _fault(answer: Any, written: Path) -> str | None:
    """Describe what is wrong with a node, by its answer and by whether its file is visible on this machine.

    Raises:
        StorageError: the node's disk is full or fails.
    """
    import ray

    try:
        ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return f"did not answer within {_ANSWER_TIMEOUT_S:g} s"
    except ray.exceptions.RayError as error:  # it died, may not write there, or lacks this package
        if fault := storage_fault(error):
            raise StorageError(
                f"{written.parent.parent}: its storage fails: {fault}", "Free some space or repair the storage."
            ) from error
        return f"failed: {str(error).strip().splitlines()[-1]}"
    return None if written.is_file() else "sees another folder of that name"


def _name_node(node: dict[str, Any]) -> str:
    """Name a node as `ray list nodes` does; nodes on one machine may differ only by id."""
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, id {node['NodeID'][:8]})"


@contextmanager
def _probe_folder(folder: Path) -> Iterator[Path]:
    """Make a folder under `folder` that holds a file `driver`; remove it at the end, with all folders made for it."""
    missing: list[Path] = []
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        try:
            missing += [path for path in (folder, *folder.parents) if not path.exists()]
            probe.mkdir(parents=True)
            (probe / "driver").write_text("driver")
        except OSError as error:
            if fault := storage_fault(error):
                raise StorageError(
                    f"output {folder}: its storage fails: {fault}", "Free some space or repair the storage."
                ) from error
            raise RequestError(
                f"output {folder}: cannot be written: {error}", "Give --output a folder that you can write to."
            ) from error
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for path in missing:
            with suppress(OSError):  # another sweep has started in it meanwhile
                path.rmdir()


def _require_listener(address: str) -> None:
    """Raise at once if nothing listens at HOST:PORT, where Ray would wait. Only Ray can resolve `auto`.

    Raises:
        OSError: nothing listens there.
        ValueError: the address has another form.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "://" in host or not port.isdecimal():
            raise ValueError("an address must be auto or HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _one_attempt() -> Iterator[None]:
    """Have Ray try an address once, for 40 s. By default it tries 20 times (ray 2.60, `Node._init_gcs_client`)."""
    name = CONNECTION_ATTEMPTS_VARIABLE
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"  # counts attempts, despite its name
    try:
        yield
    finally:
        del os.environ[name]


def _prepare_local() -> None:
    """Set the environment of a local Ray, except for variables that the user has set."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A new local Ray requires a token of its clients, and writes one into the home folder if there is none. This token
    # lives as long as the sweep, in the environment that Ray's processes inherit.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray").setLevel(logging.ERROR)  # ray.init warns that token authentication is on
