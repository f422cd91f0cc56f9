"""The slots of a worker process, and the leases by which trials hold them."""

import threading
import time

from orchestrator.record import TrialPaths, TrialResult
from orchestrator.training.attempt.events import END, Event, LeaseLost, Left

LEASE_TIMEOUT_S = 30.0
"""A lease expires when nobody has asked for its events, or renewed it, for so long."""

_POLL_S = 0.05


class SlotLease:
    """One trial's hold on a slot. It is the trial's `Listener`, and keeps its events until they are taken."""

    def __init__(self, name: str, slot: int, start: TrialResult, paths: TrialPaths) -> None:
        """
        Args:
            name: by which the recording process asks for events.
            slot: number of the slot.
            start: the trial so far.
            paths: the trial's files.
        """
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

    def on_step(self, step: int, total_steps: int) -> None:
        """Ignore the step; see `Listener`."""

    def emit(self, event: Event) -> None:
        """Keep an event until it is taken. Events after the last one are dropped; see `Listener`."""
        with self._has_events:
            if not self.has_ended:
                self._events.append(event)
                self.has_ended = isinstance(event, END)
                self._has_events.notify_all()


class SlotPool:
    """All slots of a worker process, and their leases. Methods may be called from any thread."""

    def __init__(self, num_slots: int) -> None:
        self._lock = threading.Lock()
        self._free = list(range(num_slots))
        self._leases: dict[str, SlotLease] = {}
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
            made = self._leases[name] = SlotLease(name, self._free.pop(0), start, paths)
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

    def num_free(self) -> int:
        """Return the number of free slots."""
        with self._lock:
            return len(self._free)

    def free(self, lease: SlotLease) -> None:
        """Give the lease's slot back. Its events can still be taken."""
        lease.is_slot_free = True
        with self._lock:
            self._free.append(lease.slot)

    def interrupt(self, wait_s: float) -> bool:
        """Have all trials write a checkpoint and stop after their step. No trial gets a slot from now on.

        Args:
            wait_s: how long to wait for that, in seconds.

        Returns:
            Whether all trials have ended in that time.
        """
        with self._lock:
            self._interrupted, leases = True, list(self._leases.values())
        for lease in leases:
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
                lease.emit(Left(0.0, 0.0, 0.0, 0, reason))
