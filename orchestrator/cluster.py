"""Connect to Ray, or start it here; and make sure that all its nodes see the same output folder."""

import logging
import os
import secrets
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import ClusterError


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
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"Ray at {address or 'this machine'} cannot be reached: {error}",
            "Start a cluster with `ray up cluster.yaml` or `ray start --head`, or leave --address out.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def require_shared_folder(folder: Path) -> None:
    """Write and read a probe under `folder` on every node.

    Raises:
        ClusterError: names the nodes that do not see what this machine wrote, or whose writing is not seen here.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.mkdir(parents=True)
    try:
        (probe / "driver").write_text("driver")
        task = ray.remote(num_cpus=0)(_answer_probe)
        pending = {
            node_id: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
                str(probe), node_id
            )
            for node_id in nodes
        }
        saw = {node_id: ray.get(reference) for node_id, reference in pending.items()}
        blind = [nodes[n] for n in nodes if not saw[n] or not (probe / n).is_file()]
    finally:
        shutil.rmtree(probe)
    if blind:
        raise ClusterError(
            f"output {folder} is not shared: node {', '.join(sorted(blind))} sees another folder of that name",
            "Give --output a folder on storage that every node mounts at the same path.",
        )


def _answer_probe(probe: str, node_id: str) -> bool:
    """On a node: whether it sees the driver's file, having written its own where it does."""
    if not (Path(probe) / "driver").is_file():
        return False
    (Path(probe) / node_id).write_text(node_id)
    return True


def _prepare_local() -> None:
    """Settings of a local Ray, for what the user has not set."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A fresh local Ray asks for a token of its clients and writes one into the home folder if there is none. This one
    # lives as long as the sweep, in the environment that its processes inherit.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray").setLevel(logging.ERROR)  # ray.init warns that token authentication is on
