"""A slot of some worker, held by one attempt at a trial."""

import random
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from orchestrator.errors import SweepError
from orchestrator.record import TrialPaths, TrialResult
from orchestrator.record.files import write_atomic
from orchestrator.training.attempt.events import END, Event

_POLL_S = 10.0  # the host gives a lease up after 30 s
_RETRY_S = 0.2
_RELEASE_S = 30.0


class AttemptLost(Exception):
    """This attempt at a trial has ended by a fault from outside; another may go on from the last checkpoint."""


@dataclass(frozen=True)
class Workers:
    """The workers of a sweep, as whoever trains on them sees them. Goes through Ray."""

    handles: list[Any]
    """Actors of `worker.Worker`."""
    ready: list[Any]
    """Reference for each, which resolves when it has a place and runs."""
    data: Any
    """Reference to the experiment's tokenised rows."""
    logs: Path
    """Folder for what workers print."""

    def open(self, handle: Any) -> Any:
        """Reference to a worker's slots, and why it has no more."""
        return handle.open.remote([self.data], str(self.logs))

    def acquire(self, name: str, start: TrialResult, paths: TrialPaths) -> "WorkerLease":
        """A slot for a trial, as soon as there is one.

        Args:
            name: new, never used before.
            start: the trial so far.
            paths: where it writes.

        Raises:
            SweepError: every worker has died for good.
            AttemptLost: the sweep is interrupted.
        """
        while True:
            opened, closed = self._ask()
            for free, _, handle in sorted(opened, key=lambda each: each[:2], reverse=True):
                try:
                    if free and ray.get(handle.start.remote(name, start, paths)):
                        return WorkerLease(handle, name)
                except RayActorError:  # it has just died, perhaps after it began
                    handle.release.remote(name)
            for handle in closed:
                try:
                    ray.get(self.open(handle))
                except RayError as error:
                    if not opened and not isinstance(error, RayActorError):
                        raise
            time.sleep(_RETRY_S)

    def interrupt(self, wait_s: float) -> None:
        """Have all trials write a checkpoint and stop, and no other begin.

        Args:
            wait_s: how long to wait for that, in seconds.
        """
        asked = [handle.interrupt.remote(wait_s) for handle in self._placed()]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=wait_s)

    def evict(self, name: str) -> None:
        """Make sure that no worker trains by a lease any more. Workers that know nothing of it answer at once."""
        for handle in self._placed():
            with suppress(RayError):
                WorkerLease(handle, name).release()

    def _placed(self) -> list[Any]:
        placed, _ = ray.wait(self.ready, num_returns=len(self.ready), timeout=0)
        return [handle for handle, ready in zip(self.handles, self.ready, strict=True) if ready in placed]

    def _ask(self) -> tuple[list[tuple[int, float, Any]], list[Any]]:
        """Workers that answer: those that are open, with their free slots and a random number, and the others."""
        opened, closed, num_dead = [], [], 0
        for handle in self._placed():
            try:
                free = ray.get(handle.free_slots.remote())
            except ActorDiedError:
                num_dead += 1
            except RayActorError:  # Ray starts it anew: it counts as full
                continue
            else:
                if free is None:
                    closed.append(handle)
                else:
                    opened.append((free, random.random(), handle))
        if num_dead == len(self.handles):
            raise SweepError("no worker is left: each has died for good")
        return opened, closed


class WorkerLease:
    """One slot of one worker. It must be renewed, or events be asked for, every few seconds."""

    def __init__(self, worker: Any, name: str) -> None:
        self._worker = worker
        self._name = name

    def events(self) -> list[Event]:
        """What has happened since the last call; empty where nothing has for a while.

        Raises:
            AttemptLost: the worker, or the lease there, is gone.
        """
        try:
            events: list[Event] | None = ray.get(self._worker.events.remote(self._name, _POLL_S))
        except RayError as error:
            raise AttemptLost(f"its worker was lost: {str(error).strip().splitlines()[0]}") from error
        if events is None:
            raise AttemptLost("its slot was lost: its worker is a new one, or has not heard of this process for long")
        return events

    def renew(self) -> None:
        """Keep it."""
        with suppress(RayError):  # `events` tells
            ray.get(self._worker.renew.remote(self._name))

    def is_interrupted(self) -> bool:
        """Whether the trial was stopped because the whole sweep is: then all that the worker tells is to be kept."""
        with suppress(RayError):
            return bool(ray.get(self._worker.is_interrupted.remote()))
        return False

    def release(self) -> list[Event]:
        """Give the slot back, and wait until it is free.

        Returns:
            What had not been told yet; the last of it says how the trial ended there, where that is known.
        """
        told: list[Event] = []
        deadline = time.monotonic() + _RELEASE_S
        with suppress(RayError, AttemptLost):
            ray.get(self._worker.release.remote(self._name))
            while not (told and isinstance(told[-1], END)) and time.monotonic() < deadline:
                told += self.events()
        return told


def claim(paths: TrialPaths, name: str) -> str | None:
    """Say that a trial is trained by this lease from now on.

    Returns:
        The lease by which it was trained before.
    """
    before = paths.lease.read_text() if paths.lease.is_file() else None
    write_atomic(paths.lease, name)
    return before


def is_claimed(paths: TrialPaths, name: str) -> bool:
    """Whether a trial is still this lease's."""
    return paths.lease.is_file() and paths.lease.read_text() == name
