"""The trials of a worker process: those that can share an engine train together, the others one at a time."""

import gc
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

from orchestrator.data import PreparedData
from orchestrator.errors import OrchestratorError
from orchestrator.record import TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.tracking.secrets import hide_secrets
from orchestrator.training.attempt.attempt import Attempt, run_alone
from orchestrator.training.attempt.events import Event, Failed, LeaseLost, Left, Noted, fault_fields
from orchestrator.training.attempt.log_file import log_traceback
from orchestrator.training.engines.memory_limits import MemoryLimits
from orchestrator.training.engines.sft import import_trainer
from orchestrator.training.fast.drive.multi_lora import Member, MultiLora, TrialSteps
from orchestrator.training.fast.plan import factory
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.model.device import reset_peak_memory
from orchestrator.training.worker.compatibility import Slots, not_packed_reason, open_slots
from orchestrator.training.worker.file_writers import FileWriters
from orchestrator.training.worker.garbage import freeze_garbage_collector
from orchestrator.training.worker.inputs import InputsCache
from orchestrator.training.worker.slots import SlotLease, SlotPool

MAX_ALONE_WAIT_S = 120.0
"""How long newcomers may overtake a trial that must run alone. After that, no other trial starts before it."""


class WorkerRuntime:
    """Trains trials in a thread of its own. Public methods may be called from any thread."""

    def __init__(
        self,
        spec: SweepSpec,
        data: PreparedData,
        slots: int,
        gpus: float,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the threads, which begin to load the base.

        Args:
            spec: the experiment.
            data: tokenized rows.
            slots: trials at a time.
            gpus: GPUs that the process holds; a fraction if it shares one with other processes.
            on_lost: called when the process can train no more, after all leases have ended.
        """
        self._on_lost = on_lost
        self._spec = spec
        self._num_slots = slots
        self._gpus = gpus
        self._lock = threading.Lock()
        """Guards the next two attributes."""
        self._open_slots: Slots | None = None
        """The shared slots, while a new trial may be set up at once rather than after the next step."""
        self._num_set_up = 0
        """Trials that are being set up, or are set up and have not joined yet."""
        self._pool = SlotPool(slots)
        self._arrivals: queue.SimpleQueue[SlotLease | tuple[SlotLease | None, Member | BaseException]] = (
            queue.SimpleQueue()
        )
        """New trials; trials that have been set up; an error of the set-up thread."""
        self._to_set_up: queue.SimpleQueue[tuple[SlotLease, Slots] | None] = queue.SimpleQueue()
        """Trials to set up; None once the base is loaded, so that the trainer is imported."""
        self._writers = FileWriters()
        # Only the training thread uses what follows.
        self._inputs = InputsCache(data)
        self._limits = MemoryLimits()
        self._shared_slots: Slots | str | None = None
        """The slots that trials share; or why there are none; None if they have not been opened."""
        self._too_large: MemoryOption | None = None
        self._multi_lora = MultiLora(self._pool.clock.mark)
        self._together: list[SlotLease] = []
        """Leases of the trials that train together."""
        self._has_begun = False
        self._waiting_alone: deque[tuple[SlotLease, str | None]] = deque()
        """Trials that must run alone, with the reason."""
        self._unplaced: deque[SlotLease] = deque()
        """Trials that have arrived and have not been placed yet."""
        threading.Thread(target=self._run, name="train", daemon=True).start()
        threading.Thread(target=self._run_set_up, name="set-up", daemon=True).start()

    def start(self, lease: str, start: TrialResult, paths: TrialPaths) -> bool:
        """Give a trial a slot; return False if none is free now.

        Args:
            lease: a new name, by which to ask for the trial's events.
            start: the trial so far; its configuration is what to train.
            paths: where adapters and checkpoints go.

        Raises:
            LeaseLost: this process trains no more.
        """
        shared = self._open_slots
        can_share = shared is not None and self._can_share(start.config, shared)
        made = self._pool.lease(lease, start, paths)
        if made is None:
            return False
        with self._lock:
            if shared is not None and can_share and shared is self._open_slots:
                self._queue_set_up(made, shared)
            else:
                self._arrivals.put(made)
        return True

    def events(self, lease: str, wait_s: float) -> list[Event]:
        """Return the events since the last call. If there are none, wait up to `wait_s` seconds for the first.

        Raises:
            LeaseLost: there is no such lease.
        """
        return self._pool.get(lease).take_events(wait_s)

    def renew(self, lease: str) -> None:
        """Keep a lease from expiring while nobody takes its events.

        Raises:
            LeaseLost: there is no such lease.
        """
        self._pool.get(lease).renew()

    def release(self, lease: str) -> None:
        """Ask a trial to stop at its next step. Its last events can still be taken."""
        with suppress(LeaseLost):
            self._pool.get(lease).release()

    def interrupt(self, wait_s: float, reason: str | None = None) -> bool:
        """Have all trials write a checkpoint and stop; return whether all have ended within `wait_s` seconds.

        Args:
            wait_s: how long to wait.
            reason: why, for trials that go on elsewhere; None if the whole sweep stops.
        """
        return self._pool.interrupt(wait_s, reason)

    @property
    def pool(self) -> SlotPool:
        """The slots: the progress of their trials, and whether events were not taken."""
        return self._pool

    def free_slots(self) -> int:
        """Return how many trials could be started now."""
        return self._pool.num_free()

    # The training thread

    def _run(self) -> None:
        try:
            if self._num_slots > 1:
                with suppress(OrchestratorError):  # reported to each trial that comes
                    self._require_shared_slots()
            while True:
                self._drop_released()
                self._admit()
                if self._together:
                    self._step()
                else:
                    self._run_alone(*self._waiting_alone.popleft())
        except BaseException as error:  # reported to all current leases, and to all who ask for one
            log_traceback()
            self._pool.fail_all(hide_secrets(f"{type(error).__name__}: {error}"))
            self._on_lost()

    def _drop_released(self) -> None:
        """End the waiting trials that have been released."""
        for each in [each for each in self._waiting_alone if each[0].stopping]:
            self._waiting_alone.remove(each)
            self._leave(each[0], None)
        for lease in [lease for lease in self._unplaced if lease.stopping]:
            self._unplaced.remove(lease)
            self._leave(lease, None)

    def _leave(self, lease: SlotLease, lost: str | None, is_storage: bool = False) -> None:
        """End an attempt without a result, and free its slot. The arguments are the fields of `Left`."""
        lease.emit(Left(0.0, lease.gpu_seconds, 0.0, lease.start.step, lost, is_storage))
        self._pool.free(lease)

    @staticmethod
    def _require_device() -> None:
        """Raise if the GPU has a fault. Such a fault is permanent, and the process must end."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _admit(self) -> None:
        """Take in the trials that have been started. If there is nothing else to do, wait for one.

        If a trial that must run alone has waited for `MAX_ALONE_WAIT_S`, no other is admitted before it.
        """
        while not self._waiting_alone or not self._is_shared_engine_empty():
            waiting = self._waiting_alone
            is_draining = bool(waiting) and time.monotonic() > waiting[0][0].requested_at + MAX_ALONE_WAIT_S
            with self._lock:
                self._open_slots = None
                is_closed = is_draining or self._unplaced or self._multi_lora.ran_out
                if isinstance(self._shared_slots, Slots) and not is_closed:
                    self._open_slots = self._shared_slots
            if self._unplaced and not is_draining:
                self._place(self._unplaced.popleft())
            elif self._together and self._arrivals.empty() and not self._is_gathering():
                return
            else:
                self._take_arrival()
                if self._multi_lora.ran_out:  # as a trial was set up
                    self._use_less_memory()

    def _is_gathering(self) -> bool:
        """Return whether no step has been made and more trials are being set up.

        The first step waits for them, because each number of trials needs another graph capture.
        """
        with self._lock:
            return not self._has_begun and self._num_set_up > 0

    def _take_arrival(self) -> None:
        """Wait for the next arrival: a new trial, which is placed later, or one that is set up, which joins now."""
        arrival = self._arrivals.get()
        if isinstance(arrival, tuple):
            self._join(*arrival)
        else:
            self._unplaced.append(arrival)

    def _is_shared_engine_empty(self) -> bool:
        """Return whether no trial is in the shared slots. If so, close them to newcomers until the next `_admit`."""
        with self._lock:
            if self._together or self._num_set_up:
                return False
            self._open_slots = None
            return True

    def _place(self, lease: SlotLease) -> None:
        """Have a trial set up in the shared slots, or queue it to run alone."""
        try:
            reason = self._alone_reason(lease.start.config)
        except OrchestratorError as error:
            self._fail(lease, error)
            return
        if reason is not None:
            self._waiting_alone.append((lease, reason if self._num_slots > 1 else None))
        else:
            assert isinstance(self._shared_slots, Slots)
            with self._lock:
                self._queue_set_up(lease, self._shared_slots)

    def _queue_set_up(self, lease: SlotLease, shared: Slots) -> None:
        """Hand a trial to the set-up thread. The caller holds the lock."""
        self._num_set_up += 1
        self._to_set_up.put((lease, shared))

    def _join(self, lease: SlotLease | None, member: Member | BaseException) -> None:
        """Let a trial that is set up step with the others."""
        if isinstance(member, BaseException):
            raise member
        assert lease is not None
        with self._lock:
            self._num_set_up -= 1
        if lease.is_slot_free:
            self._require_device()
        else:
            self._together.append(lease)
            self._multi_lora.add(member)

    # The set-up thread

    def _run_set_up(self) -> None:
        """Build the trainers of new trials, which takes a while, so that the other trials can train meanwhile."""
        lease: SlotLease | None = None
        while True:
            try:
                task = self._to_set_up.get()
                if task is None:
                    import_trainer()
                    continue
                lease, shared = task
                member = Member(self._shared_steps(lease, shared))
            except BaseException as error:  # ends the training thread, and with it all trials
                self._arrivals.put((lease, error))
                return
            self._arrivals.put((lease, member))
            del task, shared, member  # while the thread waits for the next trial, nothing of this one may stay alive
            lease = None

    # The slots that trials share

    def _require_shared_slots(self) -> Slots | str:
        """Return the slots that trials share, opened if need be, or why there are none."""
        if self._shared_slots is None:
            inputs = self._inputs.get(self._spec.base)
            self._to_set_up.put(None)  # imports the trainer while kernels compile, not while the base is loaded
            self._shared_slots = open_slots(self._spec, inputs, self._num_slots, self._too_large)
            if not isinstance(self._shared_slots, str):
                freeze_garbage_collector()
        return self._shared_slots

    def _forget_shared_slots(self) -> None:
        """Drop the slots that trials share. No trial may be in them."""
        self._shared_slots = None
        gc.unfreeze()

    def _alone_reason(self, config: TrialConfig) -> str | None:
        """Return why a trial must run alone, or None if it can share."""
        if self._num_slots == 1:
            return "there is one slot"
        if reason := not_packed_reason(config, self._spec):
            return reason
        shared = self._require_shared_slots()
        return shared if isinstance(shared, str) else shared.refusal_reason(config)

    def _can_share(self, config: TrialConfig, shared: Slots) -> bool:
        """Return whether a trial can have one of these open slots."""
        with suppress(OrchestratorError):  # reported when the trial is placed
            return not_packed_reason(config, self._spec) is None and shared.refusal_reason(config) is None
        return False

    def _step(self) -> None:
        """Make one step of the trials that train together."""
        began = time.monotonic()
        if len(self._multi_lora):  # some may have ended as they joined
            self._multi_lora.turn()
        share = self._gpus * (time.monotonic() - began) / len(self._together)
        for lease in self._together:
            lease.gpu_seconds += share
        remaining = [lease for lease in self._together if not lease.is_slot_free]
        if len(remaining) < len(self._together):
            self._require_device()
        self._together, self._has_begun = remaining, bool(remaining)
        if self._multi_lora.ran_out:
            self._use_less_memory()

    def _use_less_memory(self) -> None:
        """Replace an engine that has run out of memory by one that takes less; if there is none, trials run alone."""
        assert isinstance(self._shared_slots, Slots)
        with self._lock:
            self._open_slots = None
        while self._num_set_up:  # these were set up for the engine that is dropped
            self._take_arrival()
        self._multi_lora.end(torch.OutOfMemoryError("a trial was set up for an engine that has run out of memory"))
        self._together.clear()
        self._has_begun = False
        self._too_large, base = self._shared_slots.plan.option, self._shared_slots.inputs.base
        self._multi_lora.ran_out = False
        self._forget_shared_slots()
        factory.release(base)

    def _shared_steps(self, lease: SlotLease, shared: Slots) -> TrialSteps:
        """Run a trial in a shared slot, as a generator of steps, until the slot is free again."""
        write_queue = self._writers.open(lease)
        attempt = Attempt(
            lease.start, lease.paths, shared.inputs, lease, write_queue, lambda _: lease.gpu_seconds, limits=None
        )
        try:
            yield from attempt.run(lambda: shared.engine_slot(lease.slot, lease.start.config))
        finally:
            if attempt.ran_out:  # outside a pass of the engine, only the attempt knows
                with self._lock:  # this slot gets free, but the next trial needs another engine
                    self._multi_lora.ran_out, self._open_slots = True, None
            write_queue.close()
            self._pool.free(lease)
            del attempt
            gc.collect()

    def _run_alone(self, lease: SlotLease, reason: str | None) -> None:
        """Run a trial to its end while no other trains.

        Args:
            lease: the trial's.
            reason: why it must run alone, for its record.
        """
        if isinstance(self._shared_slots, Slots):
            self._forget_shared_slots()
        config, write_queue = lease.start.config, self._writers.open(lease)
        try:
            reset_peak_memory()
            lease.emit(Noted(0.0, 0.0, 0.0, {"not_packed_reason": reason}))
            run_alone(
                lease.start, lease.paths, self._inputs.get(config.base), lease, write_queue, self._gpus, self._limits
            )
        except OrchestratorError as error:
            self._fail(lease, error)
        except Exception as error:
            log_traceback()
            self._leave(lease, **fault_fields(error))
        else:
            self._pool.free(lease)
        finally:
            write_queue.close()
        self._require_device()

    def _fail(self, lease: SlotLease, error: OrchestratorError) -> None:
        """End a trial that has failed for good, and free its slot."""
        lease.emit(Failed(0.0, 0.0, 0.0, error.message, error.remedy, None, error.cause))
        self._pool.free(lease)
