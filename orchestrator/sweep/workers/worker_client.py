"""Clients of the workers: find a free slot, and hold it for one attempt at a trial.

Runs in trainables; the driver uses it to interrupt all workers.
"""

import random
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError

from orchestrator.errors import SweepError
from orchestrator.record import TrialPaths, TrialResult
from orchestrator.record.files import write_atomic
from orchestrator.sweep.workers.losses import AttemptLost, why_lost
from orchestrator.training.attempt.events import END, Event

_POLL_S = 10.0
"""Longest wait for events in one call; a worker gives an unused lease up after 30 s."""
_RETRY_S = 0.2
_RELEASE_S = 30.0
_ANSWER_S = 30.0
"""Time in which a worker says how many slots are free; one that hangs is ended by the supervisor."""


@dataclass(frozen=True)
class Workers:
    """The workers of a sweep, for code that trains on them. It is sent to other processes by Ray."""

    handles: list[Any]
    """Actors of `worker.Worker`."""
    ready: list[Any]
    """A reference for each actor, which resolves once the actor runs."""
    data: Any
    """Reference to the tokenized rows of the experiment."""
    logs: Path
    """Folder for the output of the workers."""

    def open(self, handle: Any) -> Any:
        """Return a reference to the result of `Worker.open`: the number of slots, and why there are not more."""
        return handle.open.remote([self.data], str(self.logs))

    def measure_memory(self, handle: Any) -> Any:
        """Return a reference to the result of `Worker.measure_memory`."""
        return handle.measure_memory.remote([self.data], str(self.logs))

    def acquire(self, name: str, start: TrialResult, paths: TrialPaths) -> "WorkerLease":
        """Wait for a free slot, and start a trial there.

        Args:
            name: name of the lease, never used before.
            start: the trial so far.
            paths: the trial's paths.

        Raises:
            SweepError: every worker has died for good.
            AttemptLost: the sweep is interrupted.
        """
        while True:
            for free, _, handle in sorted(self._ask(), key=lambda each: each[:2], reverse=True):
                try:
                    if free and ray.get(handle.start.remote(name, start, paths)):
                        return WorkerLease(handle, name)
                except RayActorError:  # it has just died, perhaps after it started the trial
                    handle.release.remote(name)
            time.sleep(_RETRY_S)

    def interrupt(self, wait_s: float) -> None:
        """Have all trials write a checkpoint and stop, and let no other trial start.

        Args:
            wait_s: longest time to wait for that, in seconds.
        """
        asked = [handle.interrupt.remote(wait_s) for handle in self._running()]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=wait_s)

    def evict(self, name: str) -> None:
        """Release a lease on all workers. Workers that do not know it answer at once."""
        for handle in self._running():
            with suppress(RayError):
                WorkerLease(handle, name).release()

    def _running(self) -> list[Any]:
        """Return the actors that have started."""
        started, _ = ray.wait(self.ready, num_returns=len(self.ready), timeout=0)
        return [handle for handle, ready in zip(self.handles, self.ready, strict=True) if ready in started]

    def _ask(self) -> list[tuple[int, float, Any]]:
        """Ask all open workers for their free slots.

        Returns:
            The workers that have answered, each as (free slots, random number, actor). The supervisor opens the others.

        Raises:
            SweepError: every worker has died for good.
        """
        opened, num_dead = [], 0
        for handle in self._running():
            try:
                free = ray.get(handle.free_slots.remote(), timeout=_ANSWER_S)
            except GetTimeoutError:  # it hangs; it counts as full
                continue
            except ActorDiedError:
                num_dead += 1
            except RayActorError:  # Ray restarts it; it counts as full
                continue
            else:
                if free is not None:
                    opened.append((free, random.random(), handle))
        if num_dead == len(self.handles):
            raise SweepError("no worker is left: each has died for good")
        return opened


class WorkerLease:
    """A slot of a worker. It expires unless `renew` or `events` is called every few seconds."""

    def __init__(self, worker: Any, name: str) -> None:
        self._worker = worker
        self._name = name

    def events(self) -> list[Event]:
        """Return the events since the last call; an empty list if there is none for a while.

        Raises:
            AttemptLost: the worker is gone, or it does not know the lease.
        """
        try:
            events: list[Event] | None = ray.get(self._worker.events.remote(self._name, _POLL_S))
        except RayError as error:
            raise AttemptLost(f"its worker was lost: {why_lost(error)}") from error
        if events is None:
            raise AttemptLost(
                "its slot was lost: its worker has restarted, or this process did not contact it for too long"
            )
        return events

    def renew(self) -> None:
        """Keep the slot."""
        with suppress(RayError):  # `events` reports it
            ray.get(self._worker.renew.remote(self._name))

    def is_interrupted(self) -> bool:
        """Return whether the whole sweep is interrupted: then all remaining events must be recorded."""
        with suppress(RayError):
            return bool(ray.get(self._worker.is_interrupted.remote()))
        return False

    def release(self) -> list[Event]:
        """Give the slot back, and wait until it is free.

        Returns:
            The events that had not been read. The last one says how the trial ended there, where that is known.
        """
        unread: list[Event] = []
        deadline = time.monotonic() + _RELEASE_S
        with suppress(RayError, AttemptLost):
            ray.get(self._worker.release.remote(self._name))
            while not (unread and isinstance(unread[-1], END)) and time.monotonic() < deadline:
                unread += self.events()
        return unread


def claim(paths: TrialPaths, name: str) -> str | None:
    """Note in a trial's folder that it is trained by this lease from now on.

    Returns:
        The name of the lease by which it was trained before; None if there was none.
    """
    before = paths.lease.read_text() if paths.lease.is_file() else None
    write_atomic(paths.lease, name)
    return before


def is_claimed(paths: TrialPaths, name: str) -> bool:
    """Return whether a trial is still trained by this lease."""
    return paths.lease.is_file() and paths.lease.read_text() == name
