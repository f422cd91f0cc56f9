"""One process's base, and the trials that train on it: together where they can, else one at a time."""

import gc
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from orchestrator.base import shell
from orchestrator.data import PreparedData
from orchestrator.errors import OrchestratorError, TrialError
from orchestrator.record import TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.attempt import Attempt, run_alone
from orchestrator.training.device import reset_peak_memory
from orchestrator.training.events import END, Event, Failed, LeaseLost, Left, Noted
from orchestrator.training.fast import build
from orchestrator.training.fast.build import Kind, MemoryPlan, engine_for, why_not
from orchestrator.training.fast.engine import Engine
from orchestrator.training.fast.pack import Member, Pack, Work
from orchestrator.training.loop import Ground, Seat


def plan_slots(spec: SweepSpec, data: PreparedData, wanted: int) -> tuple[int, str]:
    """How many trials should train together in this process, at most so many, and why. Loads the base."""
    if spec.training.engine == "trl" and "training.engine" not in {*spec.search.space, *spec.search.tied}:
        return 1, "engine trl trains one at a time"
    ground = Ground.of(spec.base, data)
    configs = _holdable(spec, ground)
    if not configs:
        return 1, "the fast engine cannot hold these trials"
    return build.plan_slots(ground.base, configs, ground.train, ground.held_out, wanted)


def _holdable(spec: SweepSpec, ground: Ground) -> list[TrialConfig]:
    """The corners of the search that the fast engine can hold on this base."""
    found = []
    for config in spec.corners():
        with suppress(TrialError):  # layers that are not there: it is told when the trial comes
            if config.base == spec.base and why_not(config, ground.base, ground.longest) is None:
                found.append(config)
    return found


LEASE_S = 30.0
"""A lease of which nobody has heard for so long is given up."""

MAX_JOBS = 256
"""Files and events that may wait to be written; then training waits too."""


class Host:
    """Trains in a thread of its own; all methods may be called from any."""

    def __init__(
        self,
        spec: SweepSpec,
        data: PreparedData,
        slots: int,
        gpus: float,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to load the base.

        Args:
            spec: the experiment.
            data: tokenised rows.
            slots: trials at a time.
            gpus: that the process holds; a share of one where others hold it too.
            on_lost: called when it can train no more, once all who wait have been told.
        """
        self._on_lost = on_lost
        self._spec = spec
        self._data = data
        self._slots = slots
        self._gpus = gpus
        self._lock = threading.Lock()
        self._free = list(range(slots))
        self._leases: dict[str, _Lease] = {}
        self._arrivals: queue.SimpleQueue[_Lease | tuple[_Lease, Member | BaseException]] = queue.SimpleQueue()
        self._to_set_up: queue.SimpleQueue[tuple[_Lease, _Shared]] = queue.SimpleQueue()
        self._writer = _Writer()
        # Of the thread alone:
        self._shared: _Shared | str | None = None
        self._pack = Pack()
        self._together: list[_Lease] = []
        self._num_set_up = 0
        self._alone: deque[tuple[_Lease, str | None]] = deque()
        self._lost: str | None = None
        threading.Thread(target=self._run, name="host", daemon=True).start()
        threading.Thread(target=self._set_up, name="set-up", daemon=True).start()

    def start(self, lease: str, start: TrialResult, paths: TrialPaths) -> bool:
        """Give a trial a slot; False where none is free now.

        Args:
            lease: a new name, by which to ask for the trial's events.
            start: the trial so far; its configuration is what to train.
            paths: where adapters and checkpoints go.

        Raises:
            LeaseLost: this process trains no more.
        """
        with self._lock:
            if self._lost is not None:
                raise LeaseLost(self._lost)
            for name, other in list(self._leases.items()):
                if other.paths == paths:  # an earlier attempt at this trial, whose relay is gone
                    other.release()
                if other.has_ended and other.is_given_up:
                    del self._leases[name]
            if not self._free:
                return False
            self._leases[lease] = made = _Lease(self._free.pop(0), start, paths)
        self._arrivals.put(made)
        return True

    def events(self, lease: str, wait_s: float) -> list[Event]:
        """What has happened since the last call; where that is nothing, wait for it.

        Raises:
            LeaseLost: there is no such lease.
        """
        return self._known(lease).take(wait_s)

    def renew(self, lease: str) -> None:
        """Keep a lease whose events nobody takes for a while.

        Raises:
            LeaseLost: there is no such lease.
        """
        self._known(lease).renew()

    def release(self, lease: str) -> None:
        """Ask a trial to stop at its next step. Its last event can still be taken."""
        with self._lock:
            if lease in self._leases:
                self._leases[lease].release()

    def free_slots(self) -> int:
        """Trials that could be started now."""
        with self._lock:
            return len(self._free)

    def _known(self, lease: str) -> "_Lease":
        with self._lock:
            if lease not in self._leases:
                raise LeaseLost(f"lease {lease} is unknown here")
            return self._leases[lease]

    def _run(self) -> None:
        try:
            if self._slots > 1:
                with suppress(OrchestratorError):  # it is told to each trial that comes
                    self._share()
                gc.collect()
                gc.freeze()  # what stands now stays: collections at the trials' ends need not look at it
            while True:
                self._drop_released()
                self._admit()
                if self._together:
                    self._turn()
                else:
                    self._run_alone(*self._alone.popleft())
        except BaseException as error:  # told to all who wait, and to all who come
            traceback.print_exc()
            with self._lock:
                self._lost = f"{type(error).__name__}: {error}"
                for lease in self._leases.values():
                    lease.emit(Left(0.0, 0.0, 0.0, 0, self._lost))
            self._on_lost()

    def _drop_released(self) -> None:
        """Give up the trials that wait to be alone and are wanted no more."""
        for each in [each for each in self._alone if each[0].stopping]:
            self._alone.remove(each)
            self._leave(each[0], None)

    def _leave(self, lease: "_Lease", lost: str | None) -> None:
        lease.emit(Left(0.0, lease.gpu_seconds, 0.0, lease.start.step, lost))
        self._done(lease)

    @staticmethod
    def _require_device() -> None:
        """A fault of the GPU is for good: after one, this raises, and the process ends."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _admit(self) -> None:
        """Take in the trials that were started; where there is nothing else to do, wait for one."""
        while not self._arrivals.empty() or not (self._together or (self._alone and not self._num_set_up)):
            arrival = self._arrivals.get()
            if isinstance(arrival, tuple):
                lease, member = arrival
                self._num_set_up -= 1
                if isinstance(member, BaseException):
                    raise member
                if lease.is_done:
                    self._require_device()
                else:
                    self._together.append(lease)
                    self._pack.add(member)
                del lease, member, arrival
                continue
            try:
                reason = self._why_alone(arrival.start.config)
            except OrchestratorError as error:
                self._fail(arrival, error)
                continue
            if reason is not None:
                self._alone.append((arrival, reason if self._slots > 1 else None))
            else:
                assert isinstance(self._shared, _Shared)
                self._num_set_up += 1
                self._to_set_up.put((arrival, self._shared))

    def _set_up(self) -> None:
        """In a thread of its own, for a trainer takes most of a second to build: the others train meanwhile."""
        while True:
            lease, shared = self._to_set_up.get()
            try:
                member = Member(self._shared_work(lease, shared))
            except BaseException as error:  # the host's thread then ends, and with it all its trials
                self._arrivals.put((lease, error))
                return
            self._arrivals.put((lease, member))
            del lease, shared, member  # while it waits, none of it must live on

    def _share(self) -> "_Shared | str":
        """The engine for many, which is built where it does not stand; or why it cannot be."""
        if self._shared is None:
            ground = Ground.of(self._spec.base, self._data)
            configs = _holdable(self._spec, ground)
            if not configs:
                self._shared = "no trial of this sweep can train beside others"
                return self._shared
            try:
                engine, plan = engine_for(ground.base, configs, ground.train, ground.held_out, self._slots)
            except TrialError as error:
                self._shared = error.message
                return self._shared
            kind = Kind.of(ground.base, configs, self._slots)
            self._shared = _Shared(ground, kind, engine, plan)
            self._pack.engine = engine
        return self._shared

    def _why_alone(self, config: TrialConfig) -> str | None:
        """Why a trial cannot train beside others, or None."""
        if self._slots == 1:
            return "there is one slot"
        if config.training.engine == "trl":
            return "training.engine is trl"
        if config.base != self._spec.base:
            return "its base is another than that of the trials beside it"
        shared = self._share()
        if isinstance(shared, str):
            return shared
        base = shared.ground.base
        return why_not(config, base, shared.ground.longest) or shared.kind.refuses(base, config)

    def _turn(self) -> None:
        began = time.monotonic()
        if len(self._pack):  # some may have ended as they joined
            self._pack.turn()
        share = self._gpus * (time.monotonic() - began) / len(self._together)
        for lease in self._together:
            lease.gpu_seconds += share
        going_on = [lease for lease in self._together if not lease.is_done]
        if len(going_on) < len(self._together):
            self._require_device()
        self._together = going_on

    def _shared_work(self, lease: "_Lease", shared: "_Shared") -> Work:
        """A trial beside others, until its slot is free again."""
        aside = _Aside(self._writer, lease)
        attempt = Attempt(lease.start, lease.paths, shared.ground, lease, aside, lambda: lease.gpu_seconds)
        lent = shell(shared.ground.base)
        seat = Seat(lease.slot, shared.engine, shared.plan)
        try:
            yield from attempt.run(lent, lambda: seat)
        finally:
            lent._modules.clear()  # who still names the shell must not hold its adapter's memory
            self._done(lease)
            del attempt, lent
            gc.collect()

    def _run_alone(self, lease: "_Lease", reason: str | None) -> None:
        if isinstance(self._shared, _Shared):
            self._shared = self._pack.engine = None
        began, config = time.monotonic(), lease.start.config
        try:
            reset_peak_memory()
            lease.emit(Noted(0.0, 0.0, 0.0, {"alone": reason}))
            run_alone(
                lease.start,
                lease.paths,
                Ground.of(config.base, self._data),
                lease,
                _Aside(self._writer, lease),
                lambda: self._gpus * (time.monotonic() - began),
            )
        except OrchestratorError as error:
            self._fail(lease, error)
        except Exception as error:
            traceback.print_exc()
            self._leave(lease, f"{type(error).__name__}: {error}")
        else:
            self._done(lease)
        self._require_device()

    def _fail(self, lease: "_Lease", error: OrchestratorError) -> None:
        lease.emit(Failed(0.0, 0.0, 0.0, error.message, error.remedy, None))
        self._done(lease)

    def _done(self, lease: "_Lease") -> None:
        lease.is_done = True
        with self._lock:
            self._free.append(lease.slot)


@dataclass(frozen=True)
class _Shared:
    """What the trials that train together share."""

    ground: Ground
    kind: Kind
    engine: Engine
    plan: MemoryPlan


class _Lease:
    """A trial that has a slot, and its listener."""

    def __init__(self, slot: int, start: TrialResult, paths: TrialPaths) -> None:
        self.slot = slot
        self.start = start
        self.paths = paths
        self.gpu_seconds = 0.0
        self.is_done = False
        """Its slot is free again."""
        self.has_ended = False
        """Its last event has come."""
        self._events: list[Event] = []
        self._came = threading.Condition()
        self._heard_at = time.monotonic()
        self._released = False

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


class _Writer:
    """Writes files in a thread of its own, and tells of them."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[tuple[_Lease, Callable[[], None]]] = queue.Queue(MAX_JOBS)
        threading.Thread(target=self._run, name="writer", daemon=True).start()

    def _run(self) -> None:
        while True:
            lease, job = self.jobs.get()
            try:
                if not lease.has_ended:
                    job()
            except Exception as error:  # the disk's: the trial can go on elsewhere or later, from what is written
                traceback.print_exc()
                lease.emit(Left(0.0, lease.gpu_seconds, 0.0, 0, f"{type(error).__name__}: {error}"))
                lease.release()
            finally:
                self.jobs.task_done()
                del lease, job  # while it waits, none of it must live on


class _Aside:
    """The writer, for one trial."""

    def __init__(self, writer: _Writer, lease: _Lease) -> None:
        self._writer = writer
        self._lease = lease

    def do(self, job: Callable[[], None]) -> None:
        """See `Aside`."""
        self._writer.jobs.put((self._lease, job))

    def wait(self) -> None:
        """See `Aside`."""
        self._writer.jobs.join()
