"""The slots of a worker process, and the leases by which trials hold them."""

import threading
import time
from dataclasses import replace

from orchestrator.record import TrialPaths, TrialResult
from orchestrator.training.attempt.events import END, Evaluated, Event, LeaseLost, Left

LEASE_TIMEOUT_S = 30.0
"""A lease expires when nobody has asked for its events, or renewed it, for so long."""

_POLL_S = 0.05


class ProgressClock:
    """Measures the pauses between signs of progress of a process: steps, other passes and events of its trials."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.longest_s = 0.0
        """Longest pause so far, in seconds."""
        self.has_stepped = False
        """Whether a step has been made."""
        self.has_evaluated = False
        """Whether an evaluation has been done."""

    def begin(self) -> None:
        """Begin to measure, after a time without work."""
        self._last = time.monotonic()

    def mark(self) -> None:
        """Note a sign of progress."""
        now = time.monotonic()
        self.longest_s, self._last = max(self.longest_s, now - self._last), now

    @property
    def idle_s(self) -> float:
        """Seconds since the last sign of progress."""
        return time.monotonic() - self._last


class SlotLease:
    """One trial's hold on a slot. It is the trial's `Listener`, and keeps its events until they are taken."""

    def __init__(
        self, name: str, slot: int, start: TrialResult, paths: TrialPaths, clock: ProgressClock | None = None
    ) -> None:
        """
        Args:
            name: by which the recording process asks for events.
            slot: number of the slot.
            start: the trial so far.
            paths: the trial's files.
            clock: measures the progress of the process.
        """
        self._clock = clock or ProgressClock()
        self.name = name
        self.slot = slot
        self.start = start
        self.paths = paths
        self.requested_at = time.monotonic()
        self.gpu_seconds = 0.0
        self.is_slot_free = False
        """Whether the slot has been given back."""
        self.has_ended = False
        """Whether the last event has been emitted."""
        self._events: list[Event] = []
        self._has_events = threading.Condition()
        self._renewed_at = time.monotonic()
        self._is_released = False
        self.leave_reason: str | None = None
        """Why the whole process ends its trials, if it does."""
        self._was_claimed = False
        self.wants_checkpoint = False
        """Whether the trial should write a checkpoint before it stops."""

    @property
    def is_expired(self) -> bool:
        """Whether nobody has asked for the lease for `LEASE_TIMEOUT_S`."""
        return time.monotonic() - self._renewed_at > LEASE_TIMEOUT_S

    def is_replaced(self) -> bool:
        """Return whether another lease has claimed the trial on storage, or had claimed it and has ended.

        After its driver was killed, a worker trains on until the lease expires, beside an attempt of the resumed sweep.
        """
        try:
            is_own = self.paths.lease.read_text() == self.name
        except FileNotFoundError:
            return self._was_claimed  # a trial without a sweep never has a claim
        self._was_claimed = self._was_claimed or is_own
        return not is_own

    @property
    def stopping(self) -> bool:
        """Whether the trial should end; see `Listener`."""
        return self._is_released or self.is_expired

    def release(self) -> None:
        """Ask the trial to stop."""
        self._is_released = True

    def interrupt(self) -> None:
        """Ask the trial to write a checkpoint and stop."""
        self.wants_checkpoint = True
        self._is_released = True

    def renew(self) -> None:
        """Keep the lease from expiring."""
        self._renewed_at = time.monotonic()

    def take_events(self, wait_s: float) -> list[Event]:
        """Return the events since the last call. If there are none, wait up to `wait_s` seconds for the first."""
        self.renew()
        with self._has_events:
            if not self._events:
                self._has_events.wait(wait_s)
            taken, self._events = self._events, []
        return taken

    @property
    def has_unread(self) -> bool:
        """Whether events were not taken yet."""
        with self._has_events:
            return bool(self._events)

    def on_step(self, step: int, total_steps: int) -> None:
        """Note the progress; see `Listener`."""
        self._clock.has_stepped = True
        self._clock.mark()

    def on_progress(self) -> None:
        """Note that the process is at work; see `Listener`."""
        self._clock.mark()

    def emit(self, event: Event) -> None:
        """Keep an event until it is taken. Events after the last one are dropped; see `Listener`."""
        self._clock.has_evaluated = self._clock.has_evaluated or isinstance(event, Evaluated)
        self._clock.mark()
        with self._has_events:
            if not self.has_ended:
                if isinstance(event, Left) and event.lost is None and self.leave_reason is not None:
                    event = replace(event, lost=self.leave_reason, is_outside=True)
                self._events.append(event)
                self.has_ended = isinstance(event, END)
                self._has_events.notify_all()


class SlotPool:
    """All slots of a worker process, and their leases. Methods may be called from any thread."""

    def __init__(self, num_slots: int) -> None:
        self._lock = threading.Lock()
        self._free = list(range(num_slots))
        self._leases: dict[str, SlotLease] = {}
        self.clock = ProgressClock()
        self._lost: str | None = None
        self._interrupted = False

    def lease(self, name: str, start: TrialResult, paths: TrialPaths) -> SlotLease | None:
        """Lease a free slot to this trial. Earlier attempts at the same trial are asked to stop.

        Returns:
            The lease, or None if no slot is free.

        Raises:
            LeaseLost: this process trains no more.
        """
        with self._lock:
            if self._lost is not None:
                raise LeaseLost(self._lost)
            for known, other in list(self._leases.items()):
                if other.paths == paths:  # an earlier attempt, whose recording process is gone
                    other.release()
                if other.has_ended and other.is_expired:
                    del self._leases[known]
            if not self._free or self._interrupted:
                return None
            if not self._active():
                self.clock.begin()
            made = self._leases[name] = SlotLease(name, self._free.pop(0), start, paths, self.clock)
            return made

    def get(self, name: str) -> SlotLease:
        """Return the lease of this name.

        Raises:
            LeaseLost: there is none.
        """
        with self._lock:
            if name not in self._leases:
                raise LeaseLost(f"lease {name} is unknown here")
            return self._leases[name]

    @property
    def is_busy(self) -> bool:
        """Whether a trial has not ended."""
        with self._lock:
            return bool(self._active())

    @property
    def has_unread(self) -> bool:
        """Whether a lease that somebody still renews has events that were not taken."""
        with self._lock:
            return any(lease.has_unread and not lease.is_expired for lease in self._leases.values())

    def _active(self) -> list[SlotLease]:
        """Return the leases whose trials have not ended. The caller holds the lock."""
        return [lease for lease in self._leases.values() if not lease.has_ended]

    def num_free(self) -> int:
        """Return the number of free slots."""
        with self._lock:
            return len(self._free)

    def free(self, lease: SlotLease) -> None:
        """Give the lease's slot back. Its events can still be taken."""
        lease.is_slot_free = True
        with self._lock:
            self._free.append(lease.slot)

    def interrupt(self, wait_s: float, reason: str | None = None) -> bool:
        """Have all trials write a checkpoint and stop after their step. No trial gets a slot from now on.

        Args:
            wait_s: how long to wait for that, in seconds.
            reason: why, for trials that go on elsewhere; None if the whole sweep stops.

        Returns:
            Whether all trials have ended in that time.
        """
        with self._lock:
            self._interrupted, leases = True, list(self._leases.values())
        for lease in leases:
            lease.leave_reason = reason
            lease.interrupt()
        deadline = time.monotonic() + wait_s
        while not (ended := all(lease.has_ended for lease in leases)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return ended

    def fail_all(self, reason: str) -> None:
        """End all leases, because this process trains no more. No trial gets a slot from now on."""
        with self._lock:
            self._lost = reason
            for lease in self._leases.values():
                lease.emit(Left(0.0, 0.0, 0.0, 0, reason, is_outside=True))
