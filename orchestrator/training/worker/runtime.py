"""One process's base, and the trials that train on it: together where they can, else one at a time."""

import gc
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from orchestrator.base import load_tokenizer, shared_base
from orchestrator.data import PreparedData
from orchestrator.errors import OrchestratorError
from orchestrator.record import TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections import BaseSection
from orchestrator.training.attempt.attempt import Attempt, run_alone
from orchestrator.training.attempt.events import Event, Failed, LeaseLost, Left, Noted, lost_by
from orchestrator.training.attempt.log_file import log_traceback
from orchestrator.training.engines.loop import TrialInputs
from orchestrator.training.engines.sft import import_trainer
from orchestrator.training.fast.drive.multi_lora import Member, MultiLora, TrialSteps
from orchestrator.training.fast.plan import factory
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.model.device import reset_peak_memory
from orchestrator.training.worker.compatibility import Slots, not_packed_reason, open_slots
from orchestrator.training.worker.slots import FileWriters, SlotLease, SlotPool

PATIENCE_S = 120.0
"""A trial that must be alone lets others go before it for so long."""


class WorkerRuntime:
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
        """Of the next two."""
        self._open: Slots | None = None
        """The slots for trials beside each other, while newcomers are set up at once and not after the next step."""
        self._num_set_up = 0
        self._leases = SlotPool(slots)
        self._arrivals: queue.SimpleQueue[SlotLease | tuple[SlotLease | None, Member | BaseException]] = (
            queue.SimpleQueue()
        )
        self._to_set_up: queue.SimpleQueue[tuple[SlotLease, Slots] | None] = queue.SimpleQueue()
        """Trials; None where the base has been loaded."""
        self._writers = FileWriters()
        # Of the thread alone:
        self._rows: tuple[TokenizedRows, TokenizedRows] | None = None
        self._tokenizers: dict[BaseSection, Any] = {}
        self._shared: Slots | str | None = None
        self._too_large: MemoryOption | None = None
        self._pack = MultiLora()
        self._together: list[SlotLease] = []
        self._has_begun = False
        self._alone: deque[tuple[SlotLease, str | None]] = deque()
        self._held_back: deque[SlotLease] = deque()
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
        shared = self._open
        fits = shared is not None and self._fits(start.config, shared)
        made = self._leases.take(lease, start, paths)
        if made is None:
            return False
        with self._lock:
            if shared is not None and fits and shared is self._open:
                self._set_up_soon(made, shared)
            else:
                self._arrivals.put(made)
        return True

    def events(self, lease: str, wait_s: float) -> list[Event]:
        """What has happened since the last call; where that is nothing, wait for it.

        Raises:
            LeaseLost: there is no such lease.
        """
        return self._leases.named(lease).take(wait_s)

    def renew(self, lease: str) -> None:
        """Keep a lease whose events nobody takes for a while.

        Raises:
            LeaseLost: there is no such lease.
        """
        self._leases.named(lease).renew()

    def release(self, lease: str) -> None:
        """Ask a trial to stop at its next step. Its last event can still be taken."""
        with suppress(LeaseLost):
            self._leases.named(lease).release()

    def interrupt(self, wait_s: float) -> bool:
        """Have all trials write a checkpoint and stop; returns whether they have within `wait_s` seconds."""
        return self._leases.interrupt(wait_s)

    def free_slots(self) -> int:
        """Trials that could be started now."""
        return self._leases.num_free()

    def _run(self) -> None:
        try:
            if self._slots > 1:
                with suppress(OrchestratorError):  # it is told to each trial that comes
                    self._share()
            while True:
                self._drop_released()
                self._admit()
                if self._together:
                    self._turn()
                else:
                    self._run_alone(*self._alone.popleft())
        except BaseException as error:  # told to all who wait, and to all who come
            log_traceback()
            self._leases.lose(f"{type(error).__name__}: {error}")
            self._on_lost()

    def _drop_released(self) -> None:
        """Give up the trials that wait and are wanted no more."""
        for each in [each for each in self._alone if each[0].stopping]:
            self._alone.remove(each)
            self._leave(each[0], None)
        for lease in [lease for lease in self._held_back if lease.stopping]:
            self._held_back.remove(lease)
            self._leave(lease, None)

    def _leave(self, lease: SlotLease, lost: str | None, is_storage: bool = False) -> None:
        lease.emit(Left(0.0, lease.gpu_seconds, 0.0, lease.start.step, lost, is_storage))
        self._leases.done(lease)

    @staticmethod
    def _require_device() -> None:
        """A fault of the GPU is for good: after one, this raises, and the process ends."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _admit(self) -> None:
        """Take in the trials that were started; where there is nothing else to do, wait for one.

        Once one that must be alone has waited for long, nobody is let in before it: the others end, and it is next.
        """
        while not self._alone or not self._is_empty():
            drains = bool(self._alone) and time.monotonic() > self._alone[0][0].came_at + PATIENCE_S
            with self._lock:
                self._open = None
                if isinstance(self._shared, Slots) and not (drains or self._held_back):
                    self._open = self._shared
            if self._held_back and not drains:
                self._place(self._held_back.popleft())
            elif self._together and self._arrivals.empty() and not self._gathers():
                return
            else:
                self._take_arrival()

    def _gathers(self) -> bool:
        """Whether the pack is yet to begin and others are being set up: each of its sizes is a graph to capture."""
        with self._lock:
            return not self._has_begun and self._num_set_up > 0

    def _take_arrival(self) -> None:
        """Wait for a trial that was started, which then waits to be placed; or for one that is set up, which joins."""
        arrival = self._arrivals.get()
        if isinstance(arrival, tuple):
            self._join(*arrival)
        else:
            self._held_back.append(arrival)

    def _is_empty(self) -> bool:
        """Whether nobody is in the engine for many, and nobody will be before it is opened."""
        with self._lock:
            if self._together or self._num_set_up:
                return False
            self._open = None
            return True

    def _place(self, lease: SlotLease) -> None:
        """Have a trial set up beside others, or wait to be alone."""
        try:
            reason = self._why_alone(lease.start.config)
        except OrchestratorError as error:
            self._fail(lease, error)
            return
        if reason is not None:
            self._alone.append((lease, reason if self._slots > 1 else None))
        else:
            assert isinstance(self._shared, Slots)
            with self._lock:
                self._set_up_soon(lease, self._shared)

    def _set_up_soon(self, lease: SlotLease, shared: Slots) -> None:
        self._num_set_up += 1
        self._to_set_up.put((lease, shared))

    def _join(self, lease: SlotLease | None, member: Member | BaseException) -> None:
        """Let a trial that is set up step with the others."""
        if isinstance(member, BaseException):
            raise member
        assert lease is not None
        with self._lock:
            self._num_set_up -= 1
        if lease.is_done:
            self._require_device()
        else:
            self._together.append(lease)
            self._pack.add(member)

    def _set_up(self) -> None:
        """In a thread of its own, for a trainer takes a while to build: the others train meanwhile."""
        lease: SlotLease | None = None
        while True:
            try:
                task = self._to_set_up.get()
                if task is None:
                    import_trainer()
                    continue
                lease, shared = task
                member = Member(self._shared_work(lease, shared))
            except BaseException as error:  # the host's thread then ends, and with it all its trials
                self._arrivals.put((lease, error))
                return
            self._arrivals.put((lease, member))
            del task, shared, member  # while it waits, none of it must live on
            lease = None

    def _share(self) -> Slots | str:
        """The slots for trials beside each other, made where they do not stand; or why there are none."""
        if self._shared is None:
            ground = self._ground(self._spec.base)
            self._to_set_up.put(None)  # it imports while kernels are compiled, not while the base is loaded
            self._shared = open_slots(self._spec, ground, self._slots, self._too_large)
            if not isinstance(self._shared, str):
                gc.collect()
                gc.freeze()  # what stands now stays: collections at the trials' ends need not look at it
        return self._shared

    def _unshare(self) -> None:
        """Let go of the engine for many: nobody is in it."""
        self._shared = None
        gc.unfreeze()

    def _ground(self, base: BaseSection) -> TrialInputs:
        """What trials on this base train on; tokenizer and rows are made ready once."""
        if self._rows is None:
            self._rows = TokenizedRows.of(self._data.train), TokenizedRows.of(self._data.held_out)
        if base not in self._tokenizers:
            self._tokenizers[base] = load_tokenizer(base, self._data.chat_template)
        return TrialInputs(shared_base(base), self._tokenizers[base], self._data, *self._rows)

    def _why_alone(self, config: TrialConfig) -> str | None:
        """Why a trial cannot train beside others, or None."""
        if self._slots == 1:
            return "there is one slot"
        if reason := not_packed_reason(config, self._spec):
            return reason
        shared = self._share()
        return shared if isinstance(shared, str) else shared.refuses(config)

    def _fits(self, config: TrialConfig, shared: Slots) -> bool:
        """The same, where the engine stands."""
        with suppress(OrchestratorError):  # it is told when the trial's turn comes
            return not_packed_reason(config, self._spec) is None and shared.refuses(config) is None
        return False

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
        self._together, self._has_begun = going_on, bool(going_on)
        if self._pack.ran_out:
            self._lower()

    def _lower(self) -> None:
        """A pass ran out of memory, and its trials have left it: those who come get an engine that takes less.

        Where there is none, they run alone.
        """
        assert isinstance(self._shared, Slots)
        with self._lock:
            self._open = None
        while self._num_set_up:  # for the engine that goes
            self._take_arrival()
        self._pack.end(torch.OutOfMemoryError("a trial was set up for an engine that has run out of memory"))
        self._together.clear()
        self._has_begun = False
        self._too_large, base = self._shared.plan.option, self._shared.ground.base
        self._pack.ran_out = False
        self._unshare()
        factory.release(base)

    def _shared_work(self, lease: SlotLease, shared: Slots) -> TrialSteps:
        """A trial beside others, until its slot is free again."""
        aside = self._writers.open(lease)
        attempt = Attempt(
            lease.start, lease.paths, shared.ground, lease, aside, lambda _: lease.gpu_seconds, is_alone=False
        )
        try:
            yield from attempt.run(lambda: shared.seat(lease.slot, lease.start.config))
        finally:
            aside.close()
            self._leases.done(lease)
            del attempt
            gc.collect()

    def _run_alone(self, lease: SlotLease, reason: str | None) -> None:
        if isinstance(self._shared, Slots):
            self._unshare()
        config, aside = lease.start.config, self._writers.open(lease)
        try:
            reset_peak_memory()
            lease.emit(Noted(0.0, 0.0, 0.0, {"not_packed_reason": reason}))
            run_alone(lease.start, lease.paths, self._ground(config.base), lease, aside, self._gpus)
        except OrchestratorError as error:
            self._fail(lease, error)
        except Exception as error:
            log_traceback()
            self._leave(lease, **lost_by(error))
        else:
            self._leases.done(lease)
        finally:
            aside.close()
        self._require_device()

    def _fail(self, lease: SlotLease, error: OrchestratorError) -> None:
        lease.emit(Failed(0.0, 0.0, 0.0, error.message, error.remedy, None, error.cause))
        self._leases.done(lease)
