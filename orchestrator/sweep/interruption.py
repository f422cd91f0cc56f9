"""Interrupt a sweep after a signal or a storage fault, so that it can be resumed. Runs in the driver's main thread."""

from typing import Any

from ray import cloudpickle

from orchestrator.errors import StorageError
from orchestrator.record import SweepPaths
from orchestrator.signals import StopRequest
from orchestrator.storage import storage_fault
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.upstream import error_file

_SAVING_S = 60.0
"""Time in which workers may end their current step and write checkpoints, in seconds."""


class Interruption(Exception):
    """Ends Tune's loop after a signal. Unlike KeyboardInterrupt it lets Tune end the trainables in good order."""


class Interrupter:
    """Ends Tune's loop from within its callbacks."""

    def __init__(self, stop: StopRequest, workers: Workers, paths: SweepPaths) -> None:
        """
        Args:
            stop: holds the signal, once one has arrived.
            workers: write checkpoints before the loop ends.
            paths: the sweep's paths, for messages.
        """
        self._stop = stop
        self._workers = workers
        self._paths = paths

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles a tuner with its callbacks, and each driver replaces them by its own."""
        return {}

    def check(self) -> None:
        """Raise if a signal has arrived.

        Raises:
            Interruption: a signal has arrived. All trials that could do so have written a checkpoint of their last
                step.
        """
        if self._stop.signal is not None:
            self._workers.interrupt(_SAVING_S)
            raise Interruption

    def check_trial(self, trial: Any) -> None:
        """Check a trial whose attempt has failed, before Tune counts the failure.

        Raises:
            Interruption: a signal has arrived.
            StorageError: the attempt met a storage fault, which every other attempt would meet too.
        """
        self.check()
        if fault := storage_fault(error_of(trial)):
            self._workers.interrupt(_SAVING_S)  # otherwise workers would be killed while they write
            raise storage_error(self._paths, fault)


def error_of(trial: Any) -> BaseException | None:
    """Return the error by which the last attempt at a Tune trial failed; None where it is not known.

    Tune writes the error to a file on the driver's machine, but passes it to no callback.
    """
    file = error_file(trial)
    if file is None or not file.is_file():  # a restored trial may name a file of an earlier driver
        return None
    error: BaseException = cloudpickle.loads(file.read_bytes())
    return error


def storage_error(paths: SweepPaths, fault: str) -> StorageError:
    """Return the error of a sweep that is interrupted by its storage."""
    return StorageError(
        f"{paths.root}: the sweep is interrupted because its storage fails: {fault}",
        f"Free some space or repair the storage, then continue with: orchestrator resume {paths.root}",
    )
