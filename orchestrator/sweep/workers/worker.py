"""The process that holds a base model and trains trials on it: one for each GPU, for the time of a sweep."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

import ray

from orchestrator.imports import begin, importing, leave_out_compiler, leave_out_wandb
from orchestrator.record import TrialPaths, TrialResult
from orchestrator.spec import SweepSpec
from orchestrator.sweep.workers.losses import AttemptLost
from orchestrator.sweep.workers.pulse import ProcessId, Pulse
from orchestrator.training.attempt.events import Event, LeaseLost
from orchestrator.training.attempt.log_file import output_to
from orchestrator.training.fast.shard.place import Place
from orchestrator.training.fast.warmup import precompile

if TYPE_CHECKING:
    from orchestrator.planning.fit import GpuMemory
    from orchestrator.training.worker.runtime import WorkerRuntime


SAVING_S = 20.0
"""Time in which trials write their checkpoints before this process ends by a signal, in seconds."""
_CHECK_S = 0.1
_LAST_EVENTS_S = 2.0
"""Time in which trainables fetch the last events of their trials, before the process ends."""


class Worker:
    """A Ray actor. Trainables start trials on it, and each receives the events of its trial through a lease.

    Ray restarts the actor when it dies; it must then be opened again.
    """

    def __init__(self, spec: SweepSpec, slots: int, is_fixed: bool, gpus: float, place: Place | None = None) -> None:
        """Start to import heavy libraries and to compile kernels, while the driver tokenizes.

        Args:
            spec: the experiment.
            slots: number of trials at a time.
            is_fixed: whether `slots` is final; otherwise fewer are used where memory requires it.
            gpus: GPUs of this process, possibly a fraction of one.
            place: which piece of the base this process holds; None where it holds the whole base.
        """
        if ray.get_gpu_ids():
            precompile.start(spec.corners_on_base(), slots)
        else:  # Ray hides no GPU from an actor that asked for none; CUDA reads the variable when it starts
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._spec, self._slots, self._is_fixed, self._gpus = spec, slots, is_fixed, gpus
        self._lock = threading.Lock()
        self._runtime: WorkerRuntime | None = None
        self._opened = 0, ""
        self._interrupted = False
        self._retired = False
        self._opening_since: float | None = None
        self._output = ExitStack()
        self._place = place
        self._not_prepared: Exception | None = None
        """Why the libraries could not be imported or the group not be joined."""
        self._importing: threading.Thread | None = None
        if place is not None or not _is_restarted():  # alone, it may have died of these imports
            self._importing = begin(self._prepare)
        if ray.is_initialized():  # otherwise this is a test, in a process that is not the actor's own
            retire_on_signals(self._end_by_signal)

    def open(self, data: list[Any], logs: str) -> tuple[int, str]:
        """Load the base model, unless that was done before.

        Args:
            data: a list with a reference to the tokenized rows (`PreparedData`). Ray would fetch a reference that is an
                argument itself at once, and import for it what another thread is importing.
            logs: folder for the output of this process.

        Returns:
            The number of slots, and why there are not more; an empty reason where there are as many as requested.

        Raises:
            GroupLost: the processes that hold the base in pieces with this one have not come.
            Exception: the libraries cannot be imported, or the base cannot be loaded.
        """
        with self._lock:
            if self._runtime is None:
                self._opening_since = time.monotonic()
                try:
                    self._open(data, logs)
                finally:
                    self._opening_since = None
            return self._opened

    def _open(self, data: list[Any], logs: str) -> None:
        (self._importing or begin(self._prepare)).join()
        if self._not_prepared is not None:
            raise self._not_prepared
        (rows,) = ray.get(data)
        from orchestrator.training.model.device import use_device
        from orchestrator.training.worker.compatibility import plan_slots
        from orchestrator.training.worker.runtime import WorkerRuntime

        Path(logs).mkdir(parents=True, exist_ok=True)
        self._output.enter_context(output_to(Path(logs) / f"{socket.gethostname()}-{os.getpid()}.log"))
        use_device(self._spec.resources.cpus_per_trial)
        self._opened = (self._slots, "") if self._is_fixed else plan_slots(self._spec, rows, self._slots)
        self._runtime = WorkerRuntime(self._spec, rows, self._opened[0], self._gpus, on_lost=_end_soon)

    def measure_memory(self, data: list[Any], logs: str) -> "GpuMemory | None":
        """Load the base model, unless that was done before, and return what trials may use of this process's GPU.

        The arguments are those of `open`. The result is None on a CPU.
        """
        self.open(data, logs)
        from orchestrator.planning.fit import GpuMemory

        return GpuMemory.here()

    def _prepare(self) -> None:
        """Import libraries, and join the group that holds the base in pieces. `open` raises what goes wrong.

        A process that went on without its group would load the whole base.
        """
        try:
            _import_libraries()
            if self._place is not None:
                from orchestrator.training.fast.shard.base import join_group

                join_group(self._place, on_gpu=self._gpus > 0, on_lost=_end_soon)
        except Exception as error:
            self._not_prepared = error

    def interrupt(self, wait_s: float) -> None:
        """Have all trials write a checkpoint and stop, within `wait_s` seconds. No other trial starts."""
        self._interrupted = True
        if self._runtime is not None:
            self._runtime.interrupt(wait_s)

    def retire(self, reason: str, wait_s: float) -> None:
        """Have all trials write a checkpoint and go on in another worker, within `wait_s` seconds.

        No other trial starts here. Return once the events of these trials have been fetched.

        Args:
            reason: why, for the record of the trials.
            wait_s: longest time to wait, in seconds.
        """
        self._retired = True
        deadline = time.monotonic() + wait_s
        if self._runtime is not None:
            self._runtime.interrupt(wait_s, reason)
            while self._runtime.pool.has_unread and time.monotonic() < deadline:
                time.sleep(_CHECK_S)

    def pulse(self) -> Pulse:
        """Return the state of this worker, for the supervisor."""
        process, runtime, since = ProcessId.own(), self._runtime, self._opening_since
        if runtime is None:
            idle_s = 0.0 if since is None else time.monotonic() - since
            return Pulse(process, False, since is not None, idle_s, 0.0, False, False, self._retired)
        clock = runtime.pool.clock
        return Pulse(
            process,
            True,
            runtime.pool.is_busy,
            clock.idle_s,
            clock.longest_s,
            clock.has_stepped,
            clock.has_evaluated,
            self._retired,
        )

    def _end_by_signal(self, number: Signals) -> None:
        """Retire, then end this process with the code of the signal.

        A process that holds a piece of a base stays for the whole time: the others need it to save their last steps.
        """
        deadline = time.monotonic() + SAVING_S
        self.retire(f"its process got {number.name}, as before a preemption", SAVING_S)
        while self._place is not None and time.monotonic() < deadline:
            time.sleep(_CHECK_S)
        time.sleep(_LAST_EVENTS_S)
        os._exit(128 + number)

    def is_interrupted(self) -> bool:
        """Return whether `interrupt` has been called."""
        return self._interrupted

    def free_slots(self) -> int | None:
        """Return the number of free slots; None before the worker is opened.

        Raises:
            AttemptLost: the sweep is interrupted, so that no slot will become free.
        """
        if self._interrupted:
            raise AttemptLost("the sweep is interrupted")
        if self._runtime is None:
            return None
        return 0 if self._retired else self._runtime.free_slots()

    def start(self, lease: str, start: TrialResult, paths: TrialPaths) -> bool:
        """Start a trial, see `WorkerRuntime.start`. End the process if its training thread has ended.

        Returns:
            Whether the trial was started.
        """
        if self._runtime is None or self._interrupted or self._retired:
            return False
        try:
            return self._runtime.start(lease, start, paths)
        except LeaseLost:
            os._exit(1)

    def events(self, lease: str, wait_s: float) -> list[Event] | None:
        """Return new events of a trial, see `WorkerRuntime.events`; None where there is no such lease."""
        if self._runtime is None:
            return None
        try:
            return self._runtime.events(lease, wait_s)
        except LeaseLost:
            return None

    def renew(self, lease: str) -> None:
        """Renew a lease. A lost lease is ignored here: `events` reports it."""
        if self._runtime is None:
            return
        with suppress(LeaseLost):
            self._runtime.renew(lease)

    def release(self, lease: str) -> None:
        """Give a slot back, see `WorkerRuntime.release`."""
        if self._runtime is not None:
            self._runtime.release(lease)


def _is_restarted() -> bool:
    """Return whether Ray has started this actor again, after another process of it has died."""
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def retire_on_signals(retire: Callable[[Signals], None]) -> None:
    """Call `retire` in a thread of its own when SIGTERM or SIGHUP arrives in this process.

    Ray's main thread waits outside Python most of the time, where no Python handler runs; the wakeup descriptor is
    written to by the C handler itself. A local Ray's processes have these signals blocked (`shielding_children`): there
    the driver gets them, and interrupts all workers.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = (Signals.SIGTERM, Signals.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while arrived := os.read(reader, 1):
            if arrived[0] in numbers:
                retire(Signals(arrived[0]))

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _end_soon() -> None:
    """End the process after trainables have fetched the last events of their trials. Ray then starts a new one."""
    time.sleep(_LAST_EVENTS_S)
    os._exit(1)


def _import_libraries() -> None:
    leave_out_compiler()
    leave_out_wandb()
    with importing():
        import datasets  # noqa: F401  # needed to unpickle the rows

        import orchestrator.training.worker.runtime  # noqa: F401
