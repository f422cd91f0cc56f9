"""Report what a sweep waits for while the cluster has no free resources for its workers."""

import threading
from collections.abc import Callable
from typing import Any

import ray

from orchestrator.words import counted

_PATIENCE_S = 15.0
"""Time in which workers usually start; nothing is reported before."""
_PERIOD_S = 60.0
"""Shortest time between two messages. A message is repeated only if it has changed."""
_STOP_S = 5.0
KIND_PREFIX = "accelerator_type:"
"""Beginning of the names of the resources that mark nodes by their kind of GPU."""


def kind_of_gpu(accelerator: str | None) -> dict[str, float]:
    """Return the resource by which Ray marks nodes with this kind of GPU, and the little that a process takes of it.

    Empty for any kind. The amount is that of Ray's own option `accelerator_type` (ray/_common/utils.py), which
    placement groups do not have.
    """
    return {} if accelerator is None else {f"{KIND_PREFIX}{accelerator}": 0.001}


class PlacementNotice:
    """A thread of the driver that reports how many workers have started, what each needs, and what is free."""

    def __init__(
        self, ready: list[Any], gpus: float, cpus: int, say: Callable[[str], None], accelerator: str | None = None
    ) -> None:
        """Start the thread.

        Args:
            ready: a reference for each worker, which resolves once the worker runs.
            gpus: GPUs of each worker.
            cpus: CPU cores of each worker.
            say: called with a message for the user.
            accelerator: the kind of GPU; None for any kind.
        """
        self._gpu = "GPU" if accelerator is None else f"{accelerator} GPU"
        self._ready = ready
        self._gpus = gpus
        self._cpus = cpus
        self._say = say
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="placement", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(_STOP_S)

    def _watch(self) -> None:
        said, wait_s = "", _PATIENCE_S
        while not self._stopped.wait(wait_s):
            started, waiting = ray.wait(self._ready, num_returns=len(self._ready), timeout=0)
            if not waiting:
                if said:
                    self._say(f"{len(started)} of {counted(len(started), 'worker')} started")
                return
            sentence = self._describe(len(started))
            if sentence != said:
                self._say(sentence)
            said, wait_s = sentence, _PERIOD_S

    def _describe(self, num_started: int) -> str:
        free, there = ray.available_resources(), ray.cluster_resources()
        kinds = (["GPU"] if self._gpus else []) + ["CPU"]
        names = {"GPU": "GPUs", "CPU": "CPU cores"}
        takes = {"GPU": f"{self._gpus:g} {self._gpu}", "CPU": counted(self._cpus, "CPU core")}
        left = [f"{int(free.get(kind, 0))} of {int(there.get(kind, 0))} {names[kind]}" for kind in kinds]
        return (
            f"waiting for the cluster: {num_started} of {counted(len(self._ready), 'worker')} started; each takes "
            f"{' and '.join(takes[kind] for kind in kinds)} on one node; free now: {', '.join(left)}"
        )
