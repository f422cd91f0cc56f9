"""The process that holds a base and trains on it; one a GPU, for the time of a sweep."""

import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from orchestrator.imports import begin, importing, leave_out_compiler, leave_out_wandb
from orchestrator.record import TrialPaths, TrialResult
from orchestrator.spec import SweepSpec
from orchestrator.sweep.workers.worker_client import AttemptLost
from orchestrator.training.attempt.events import Event, LeaseLost
from orchestrator.training.attempt.log_file import output_to
from orchestrator.training.fast.warmup import precompile

if TYPE_CHECKING:
    from orchestrator.training.worker.runtime import WorkerRuntime


_LAST_EVENTS_S = 2.0


class Worker:
    """A Ray actor. Relays start trials on it, and hear of them by the lease that each of them holds.

    Ray starts it anew when it dies; it must then be opened again.
    """

    def __init__(self, spec: SweepSpec, slots: int, is_fixed: bool, gpus: float) -> None:
        """Begin to import what is heavy and to compile, while the driver makes tokens.

        Args:
            spec: the experiment.
            slots: trials at a time.
            is_fixed: whether that is settled; else fewer are taken where memory says so.
            gpus: that this process has, perhaps a share of one.
        """
        if ray.get_gpu_ids():
            precompile.start(spec.corners_on_base(), slots)
        else:  # Ray hides no GPU from an actor that asked for none; read when CUDA starts
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._spec, self._slots, self._is_fixed, self._gpus = spec, slots, is_fixed, gpus
        self._lock = threading.Lock()
        self._host: WorkerRuntime | None = None
        self._opened = 0, ""
        self._interrupted = False
        self._output = ExitStack()
        self._importing = begin(_import_libraries)

    def open(self, data: list[Any], logs: str) -> tuple[int, str]:
        """Begin to load the base; nothing if that was done before.

        Args:
            data: holds a reference to the experiment's tokenised rows (`PreparedData`). Ray fetches one that is an
                argument itself at once, and imports for that what another thread is about to import.
            logs: folder for what this process prints.

        Returns:
            The slots there are, and why it is not more; nothing where it is as many as were asked for.
        """
        with self._lock:
            if self._host is None:
                self._importing.join()
                (rows,) = ray.get(data)
                from orchestrator.training.model.device import use_device
                from orchestrator.training.worker.compatibility import plan_slots
                from orchestrator.training.worker.runtime import WorkerRuntime

                Path(logs).mkdir(parents=True, exist_ok=True)
                self._output.enter_context(output_to(Path(logs) / f"{socket.gethostname()}-{os.getpid()}.log"))
                use_device(self._spec.resources.cpus_per_trial)
                self._opened = (self._slots, "") if self._is_fixed else plan_slots(self._spec, rows, self._slots)
                self._host = WorkerRuntime(self._spec, rows, self._opened[0], self._gpus, on_lost=_end_soon)
            return self._opened

    def interrupt(self, wait_s: float) -> None:
        """Have all trials write a checkpoint and stop, within so many seconds; no other begins."""
        self._interrupted = True
        if self._host is not None:
            self._host.interrupt(wait_s)

    def is_interrupted(self) -> bool:
        """Whether `interrupt` has been called."""
        return self._interrupted

    def free_slots(self) -> int | None:
        """Trials that could be started now; None before it is opened.

        Raises:
            AttemptLost: none ever will be, for the sweep is interrupted.
        """
        if self._interrupted:
            raise AttemptLost("the sweep is interrupted")
        return None if self._host is None else self._host.free_slots()

    def start(self, lease: str, start: TrialResult, paths: TrialPaths) -> bool:
        """See `WorkerRuntime`. A process whose training has ended for good makes room for a new one."""
        if self._host is None or self._interrupted:
            return False
        try:
            return self._host.start(lease, start, paths)
        except LeaseLost:
            os._exit(1)

    def events(self, lease: str, wait_s: float) -> list[Event] | None:
        """See `WorkerRuntime`; None where there is no such lease."""
        if self._host is None:
            return None
        try:
            return self._host.events(lease, wait_s)
        except LeaseLost:
            return None

    def renew(self, lease: str) -> None:
        """See `WorkerRuntime`. A lease that is lost is told of by `events`."""
        if self._host is None:
            return
        with suppress(LeaseLost):
            self._host.renew(lease)

    def release(self, lease: str) -> None:
        """See `WorkerRuntime`."""
        if self._host is not None:
            self._host.release(lease)


def _end_soon() -> None:
    """End the process, once relays have taken their trials' last events: Ray then makes a new one."""
    time.sleep(_LAST_EVENTS_S)
    os._exit(1)


def _import_libraries() -> None:
    leave_out_compiler()
    leave_out_wandb()
    with importing():
        import datasets  # noqa: F401  # rows need it

        import orchestrator.training.worker.runtime  # noqa: F401
