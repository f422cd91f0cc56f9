"""Count the failed attempts at trials, and decide which trials restart. Runs in the driver's main thread.

Tune's own count cannot tell a lost worker from an error of the training, and is never reset (ray 2.60,
`Trial.handle_error`). So Tune restarts without a limit here, and this module ends a trial by writing its result: the
next attempt at it only reads that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError

from orchestrator.record import SweepRecord, TrialPaths, TrialState, end_trial, read_trial, write_record
from orchestrator.record.faults import Fault, append_fault
from orchestrator.sweep.tune_trial import plain_values
from orchestrator.sweep.workers.losses import AttemptLost, why_lost
from orchestrator.upstream import error_file
from orchestrator.words import counted

UNLIMITED = -1
"""Restarts that Tune allows by itself."""


@dataclass
class _Count:
    """Failed attempts at one trial since its last new checkpoint."""

    step: int
    """Step of that checkpoint; 0 without one."""
    failures: int = 0
    """Errors of the training."""
    losses: int = 0
    """Faults of the infrastructure."""


class FailureCounter:
    """Decides after each failed attempt whether the trial restarts. Records and says the decision."""

    def __init__(self, record: SweepRecord, say: Callable[[str], None]) -> None:
        """
        Args:
            record: the sweep's record.
            say: called with a message about each failed attempt.
        """
        self._record = record
        self._say = say
        self._counts: dict[str, _Count] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles a tuner with its scheduler, and each driver replaces it by its own."""
        return {}

    def allow(self, trial: Any) -> None:
        """Let a Tune trial that is added restart as often as this module decides."""
        trial.max_failures = 0 if self._paths_of(trial).result.is_file() else UNLIMITED

    def take(self, trial: Any) -> None:
        """Count a failed attempt that Tune is about to repeat. Write the trial's result if no attempt is left."""
        paths = self._paths_of(trial)
        if paths.result.is_file():  # it has failed by its own values, and the next attempt reads that
            trial.max_failures = 0
            return
        error = error_of(trial)
        step = _checkpoint_step(read_trial(paths, self._record.info).checkpoint) if paths.progress.is_file() else 0
        count = self._counts.get(trial.trial_id)
        if count is None or step > count.step:
            count = self._counts[trial.trial_id] = _Count(step)
        resources, cause = self._record.info.spec.resources, words_of(error)
        if counts_as_failure(error):
            count.failures += 1
            number, limit, name = count.failures, resources.max_failures, "failure"
        else:
            count.losses += 1
            number, limit, name = count.losses, resources.max_restarts, "loss"
        if number <= limit:
            then = f"restarts from step {step}" + (
                f" ({number} of {limit} without a new checkpoint)" if number > 1 else ""
            )
        else:
            times = counted(number, name) if name == "failure" else f"{number} {'losses' if number > 1 else 'loss'}"
            then = f"gave up after {times} without a new checkpoint"
            self._give_up(trial, paths, f"{then}; the last: {cause}")
        fault = Fault(trial_id=trial.trial_id, step=step, cause=cause, then=then)
        append_fault(self._record.paths, fault)
        self._say(str(fault))

    def _give_up(self, trial: Any, paths: TrialPaths, why: str) -> None:
        if not paths.config.is_file():  # its trainable failed before it wrote the configuration
            write_record(paths.config, self._record.info.spec.trial_config(plain_values(trial.config)))
        paths.lease.unlink(missing_ok=True)
        end_unfinished(self._record, paths, TrialState.FAILED, error=why, failure="infrastructure")
        trial.max_failures = 0

    def _paths_of(self, trial: Any) -> TrialPaths:
        return self._record.paths.trial(trial.trial_id)


def error_of(trial: Any) -> BaseException | None:
    """Return the error by which the last attempt at a Tune trial failed; None where it is not known.

    Tune writes the error to a file on the driver's machine, but passes it to no callback.
    """
    file = error_file(trial)
    if file is None or not file.is_file():  # a restored trial may name a file of an earlier driver
        return None
    error: BaseException = cloudpickle.loads(file.read_bytes())
    return error


def counts_as_failure(error: BaseException | None) -> bool:
    """Return whether an attempt has failed by an error of its training, not by a fault of the infrastructure."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    if isinstance(error, AttemptLost):
        return error.counts
    return error is not None and not isinstance(error, RayActorError)


def words_of(error: BaseException | None) -> str:
    """Return the cause of a failed attempt in one line."""
    if error is None:
        return "its process died"
    if isinstance(error, RayActorError):
        return f"its reporting process was lost: {why_lost(error)}"
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def end_unfinished(record: SweepRecord, paths: TrialPaths, state: TrialState, **fields: str | None) -> None:
    """Write the result of a trial that has none, from its progress; `fields` are those of `TrialResult` to set."""
    if paths.result.is_file():
        return
    so_far = read_trial(paths, record.info)
    end_trial(paths, so_far.model_copy(update={"state": state, **fields}))


def _checkpoint_step(checkpoint: str | None) -> int:
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0
