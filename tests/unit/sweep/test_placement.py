"""A sweep that waits for a busy cluster reports what it waits for."""

import threading
from typing import Any

import pytest
import ray

from orchestrator.sweep.workers import placement
from orchestrator.sweep.workers.placement import PlacementNotice


class Cluster:
    """Replaces Ray: three workers, some of which have started."""

    def __init__(self) -> None:
        self.num_started = 0
        self.free = {"GPU": 1.0, "CPU": 7.9}

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return refs[: self.num_started], refs[self.num_started :]

    def available_resources(self) -> dict[str, float]:
        return self.free

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": 8.0, "CPU": 64.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    for name in ("wait", "available_resources", "cluster_resources"):
        monkeypatch.setattr(ray, name, getattr(cluster, name))
    monkeypatch.setattr(placement, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(placement, "_PERIOD_S", 0.01)
    return cluster


def test_requested_and_free_resources_are_reported_when_they_change(cluster: Cluster) -> None:
    said: list[str] = []
    came = threading.Event()

    def say(sentence: str) -> None:
        said.append(sentence)
        came.set()

    def after(**change: Any) -> None:
        came.clear()
        vars(cluster).update(change)
        assert came.wait(10)

    notice = PlacementNotice(["a", "b", "c"], gpus=2, cpus=4, say=say)
    assert came.wait(10)
    after(num_started=1)
    after(free={"CPU": 3.9})
    after(num_started=3)
    notice.stop()
    takes = "each takes 2 GPU and 4 CPU cores on one node; free now"
    assert said == [
        f"waiting for the cluster: 0 of 3 workers started; {takes}: 1 of 8 GPUs, 7 of 64 CPU cores",
        f"waiting for the cluster: 1 of 3 workers started; {takes}: 1 of 8 GPUs, 7 of 64 CPU cores",
        f"waiting for the cluster: 1 of 3 workers started; {takes}: 0 of 8 GPUs, 3 of 64 CPU cores",
        "3 of 3 workers started",
    ]


def test_nothing_is_reported_if_workers_start_in_time(cluster: Cluster) -> None:
    cluster.num_started = 1
    said: list[str] = []
    notice = PlacementNotice(["a"], gpus=0, cpus=1, say=said.append)
    notice._thread.join(10)
    assert said == []


@pytest.mark.usefixtures("cluster")
def test_the_kind_of_gpu_is_named() -> None:
    said: list[str] = []
    came = threading.Event()
    notice = PlacementNotice(["a", "b", "c"], 1, 4, lambda line: (said.append(line), came.set())[0], "H100")
    assert came.wait(10)
    notice.stop()
    assert "each takes 1 H100 GPU and 4 CPU cores on one node" in said[0]
