"""Interrupt a sweep after a signal or a fault, so that it can be resumed. Runs in the driver's main thread."""

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.record import SweepPaths
from orchestrator.signals import StopRequest
from orchestrator.storage import storage_fault
from orchestrator.sweep.failures import FailureCounter, error_of
from orchestrator.sweep.workers.worker_client import Workers

_SAVING_S = 60.0
"""Time in which workers may end their current step and write checkpoints, in seconds."""


class Interruption(Exception):
    """Ends Tune's loop after a signal. Unlike KeyboardInterrupt it lets Tune end the trainables in good order."""


class Interrupter:
    """Ends Tune's loop from within its callbacks."""

    def __init__(
        self,
        stop: StopRequest,
        workers: Workers,
        paths: SweepPaths,
        failures: FailureCounter,
        fault: Callable[[], OrchestratorError | None],
    ) -> None:
        """
        Args:
            stop: holds the signal, once one has arrived.
            workers: write checkpoints before the loop ends.
            paths: the sweep's paths, for messages.
            failures: decides which trials restart.
            fault: returns a fault after which the sweep cannot go on; None without one.
        """
        self._stop = stop
        self._workers = workers
        self._paths = paths
        self._failures = failures
        self._fault = fault

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles a tuner with its callbacks, and each driver replaces them by its own."""
        return {}

    def check(self) -> None:
        """Raise if the sweep is to end now.

        Raises:
            Interruption: a signal has arrived. All trials that could do so have written a checkpoint of their last
                step.
            OrchestratorError: the sweep cannot go on. Here too, trials have written checkpoints where that is possible.
        """
        fault = self._fault()
        if self._stop.signal is None and fault is None:
            return
        self._workers.interrupt(_SAVING_S)
        if self._stop.signal is not None:
            raise Interruption
        assert fault is not None
        raise fault

    def check_trial(self, trial: Any) -> None:
        """Check a trial whose attempt has failed, and decide whether it restarts.

        Raises:
            Interruption: a signal has arrived.
            StorageError: the attempt met a storage fault, which every other attempt would meet too.
            OrchestratorError: the sweep cannot go on.
        """
        self.check()
        if fault := storage_fault(error_of(trial)):
            self._workers.interrupt(_SAVING_S)  # otherwise workers would be killed while they write
            raise storage_error(self._paths, fault)
        if trial.status == Trial.ERROR:  # a trial that has failed for good still has its own status
            self._failures.take(trial)


def storage_error(paths: SweepPaths, fault: str) -> StorageError:
    """Return the error of a sweep that is interrupted by its storage."""
    return StorageError(
        f"{paths.root}: the sweep is interrupted because its storage fails: {fault}",
        f"Free some space or repair the storage, then continue with: orchestrator resume {paths.root}",
    )
