"""How a sweep is interrupted: by a signal, or by a fault of its storage. Both leave it so that it can go on."""

from pathlib import Path
from typing import Any

from ray import cloudpickle

from orchestrator.errors import StorageError
from orchestrator.record import SweepPaths
from orchestrator.signals import StopRequest
from orchestrator.storage import storage_fault
from orchestrator.sweep.workers.worker_client import Workers

_SAVING_S = 60.0
"""How long workers may take to end their step and write checkpoints."""


class Interruption(Exception):
    """Ends Tune's loop after a signal. Unlike KeyboardInterrupt it lets Tune end the relays in good order."""


class Interrupter:
    """Ends Tune's loop, from within its callbacks."""

    def __init__(self, stop: StopRequest, workers: Workers, paths: SweepPaths) -> None:
        """
        Args:
            stop: says whether a signal has come.
            workers: write checkpoints before the loop ends.
            paths: of the sweep, for messages.
        """
        self._stop = stop
        self._workers = workers
        self._paths = paths

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles a tuner with its callbacks, and each driver puts its own in their place."""
        return {}

    def check(self) -> None:
        """
        Raises:
            Interruption: a signal has come. All trials that could have written a checkpoint of their last step.
        """
        if self._stop.signal is not None:
            self._workers.interrupt(_SAVING_S)
            raise Interruption

    def check_trial(self, trial: Any) -> None:
        """Look at a trial whose attempt has failed, before Tune counts that.

        Raises:
            Interruption: a signal has come.
            StorageError: the attempt met a fault of the storage, as every other one would.
        """
        self.check()
        if fault := storage_fault(error_of(trial)):
            self._workers.interrupt(_SAVING_S)  # or they would be killed as they write
            raise storage_error(self._paths, fault)


def error_of(trial: Any) -> BaseException | None:
    """The error by which the last attempt at a Tune trial failed.

    Tune writes it on this machine at once (ray 2.60, `Trial.handle_error`), but hands it to nobody.
    """
    file = trial.pickled_error_file
    if file is None or not Path(file).is_file():  # an earlier driver's, of whose trial this one restored the state
        return None
    error: BaseException = cloudpickle.loads(Path(file).read_bytes())
    return error


def storage_error(paths: SweepPaths, fault: str) -> StorageError:
    """Say that a sweep is interrupted by its storage."""
    return StorageError(
        f"{paths.root}: the sweep is interrupted, for its storage fails: {fault}",
        f"Make room or mend the storage, then go on with: orchestrator resume {paths.root}",
    )
