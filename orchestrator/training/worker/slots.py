"""Trials on a host: their leases on its slots, and the threads that write their files."""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.record import TrialPaths, TrialResult
from orchestrator.training.attempt.events import END, Event, LeaseLost, Left, lost_by
from orchestrator.training.attempt.log_file import log_traceback

LEASE_S = 30.0
"""A lease of which nobody has heard for so long is given up."""

_LOOK_S = 0.05

MAX_JOBS = 64
"""Files and events of a trial that may wait to be written; then training waits too."""


class SlotLease:
    """A trial that has a slot, and its listener."""

    def __init__(self, slot: int, start: TrialResult, paths: TrialPaths) -> None:
        self.slot = slot
        self.start = start
        self.paths = paths
        self.came_at = time.monotonic()
        self.gpu_seconds = 0.0
        self.is_done = False
        """Its slot is free again."""
        self.has_ended = False
        """Its last event has come."""
        self._events: list[Event] = []
        self._came = threading.Condition()
        self._heard_at = time.monotonic()
        self._released = False
        self.wants_checkpoint = False
        """Whether it is to write a checkpoint before it stops."""

    @property
    def is_given_up(self) -> bool:
        """Whether nobody has asked for it for a long time."""
        return time.monotonic() - self._heard_at > LEASE_S

    @property
    def stopping(self) -> bool:
        """See `Listener`."""
        return self._released or self.is_given_up

    def release(self) -> None:
        """Have it stop."""
        self._released = True

    def interrupt(self) -> None:
        """Have it write a checkpoint and stop."""
        self.wants_checkpoint = True
        self._released = True

    def renew(self) -> None:
        """Somebody is there."""
        self._heard_at = time.monotonic()

    def take(self, wait_s: float) -> list[Event]:
        """The events since the last call, waiting for the first."""
        self.renew()
        with self._came:
            if not self._events:
                self._came.wait(wait_s)
            taken, self._events = self._events, []
        return taken

    def on_step(self, step: int, total_steps: int) -> None:
        """See `Listener`."""

    def emit(self, event: Event) -> None:
        """See `Listener`. Nothing comes after the last."""
        with self._came:
            if not self.has_ended:
                self._events.append(event)
                self.has_ended = isinstance(event, END)
                self._came.notify_all()


class SlotPool:
    """All those of a host. Methods may be called from any thread."""

    def __init__(self, slots: int) -> None:
        """
        Args:
            slots: that there are.
        """
        self._lock = threading.Lock()
        self._free = list(range(slots))
        self._by_name: dict[str, SlotLease] = {}
        self._lost: str | None = None
        self._interrupted = False

    def take(self, name: str, start: TrialResult, paths: TrialPaths) -> SlotLease | None:
        """A free slot for this trial; None where there is none. Earlier attempts at the trial are asked to stop.

        Raises:
            LeaseLost: the host trains no more.
        """
        with self._lock:
            if self._lost is not None:
                raise LeaseLost(self._lost)
            for known, other in list(self._by_name.items()):
                if other.paths == paths:  # an earlier attempt, whose relay is gone
                    other.release()
                if other.has_ended and other.is_given_up:
                    del self._by_name[known]
            if not self._free or self._interrupted:
                return None
            made = self._by_name[name] = SlotLease(self._free.pop(0), start, paths)
            return made

    def named(self, name: str) -> SlotLease:
        """
        Raises:
            LeaseLost: there is none of that name.
        """
        with self._lock:
            if name not in self._by_name:
                raise LeaseLost(f"lease {name} is unknown here")
            return self._by_name[name]

    def num_free(self) -> int:
        """Slots."""
        with self._lock:
            return len(self._free)

    def done(self, lease: SlotLease) -> None:
        """Its slot is free again; its events can still be taken."""
        lease.is_done = True
        with self._lock:
            self._free.append(lease.slot)

    def interrupt(self, wait_s: float) -> bool:
        """Have all trials write a checkpoint and stop after their step; no trial gets a slot from now on.

        Args:
            wait_s: how long to wait for that, in seconds.

        Returns:
            Whether all have come to their end in that time.
        """
        with self._lock:
            self._interrupted, leases = True, list(self._by_name.values())
        for lease in leases:
            lease.interrupt()
        deadline = time.monotonic() + wait_s
        while not (ended := all(lease.has_ended for lease in leases)) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return ended

    def lose(self, why: str) -> None:
        """The host trains no more: all trials are told, and none gets a slot."""
        with self._lock:
            self._lost = why
            for lease in self._by_name.values():
                lease.emit(Left(0.0, 0.0, 0.0, 0, why))


class FileWriter:
    """Writes a trial's files in a thread of its own, and tells of them."""

    def __init__(self, lease: SlotLease, earlier: threading.Thread | None = None) -> None:
        """
        Args:
            lease: hears of it, and of faults.
            earlier: of another attempt at the trial, whose files come first.
        """
        self._lease = lease
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_JOBS)
        self.thread = threading.Thread(target=self._run, args=(earlier,), name="writer", daemon=True)
        self.thread.start()

    def do(self, job: Callable[[], None]) -> None:
        """See `Aside`."""
        self._jobs.put(job)

    def wait(self) -> None:
        """See `Aside`."""
        self._jobs.join()

    def close(self) -> None:
        """No job comes after those that wait."""
        self._jobs.put(None)

    def _run(self, earlier: threading.Thread | None) -> None:
        if earlier is not None:
            earlier.join()
        del earlier
        lease = self._lease
        while (job := self._jobs.get()) is not None:
            try:
                if not lease.has_ended:
                    job()
            except Exception as error:  # the disk's: the trial can go on elsewhere or later, from what is written
                log_traceback()
                lease.emit(Left(0.0, lease.gpu_seconds, 0.0, 0, **lost_by(error)))
                lease.release()
            finally:
                self._jobs.task_done()
                del job  # while it waits, nothing of it must live on


class FileWriters:
    """Those of a process: where two attempts at a trial meet, the earlier one's files come first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[Path, threading.Thread] = {}

    def open(self, lease: SlotLease) -> FileWriter:
        """For one attempt."""
        with self._lock:
            writer = FileWriter(lease, self._last.get(lease.paths.root))
            self._last[lease.paths.root] = writer.thread
        return writer
