"""Results that only the driver can write: of stopped trials, and of trials whose trainable is gone.

Runs in the driver's main thread, in Tune's callbacks.
"""

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from orchestrator.record import SweepRecord, TrialPaths, TrialState, read_added, write_record
from orchestrator.sweep.failures import end_unfinished, error_of, words_of
from orchestrator.sweep.schedulers.conductor import Conductor
from orchestrator.sweep.snapshot import save_snapshot
from orchestrator.sweep.tune_trial import plain_values
from orchestrator.upstream import limit_state_writing, staging_folder, write_state_next

_CLOSING_S = 60.0
_FREE_STATE_S = 0.02
_MAX_STATE_SHARE = 0.1
_LONGEST_STATE_PAUSE_S = 5.0
"""Tune's state is written at each turn while that takes 20 ms (some 200 trials); beyond that in a tenth of the time."""


class ResultKeeper(tune.Callback):  # type: ignore[misc]  # mypy skips ray
    """Writes result.json where the trainable has not, and saves the state of Tune and of the scheduler.

    A trainable cannot tell a stop by the scheduler from an interruption, after which the trial is resumed later. During
    these callbacks the trainable waits for Tune, and everything that it has reported is on disk.
    """

    def __init__(self, record: SweepRecord, conductor: Conductor, check_stop: Callable[[], None]) -> None:
        """
        Args:
            record: the sweep's record.
            conductor: knows why a trial was stopped.
            check_stop: called at each iteration of Tune's loop; ends the sweep by raising.
        """
        self._record = record
        self._conductor = conductor
        self._check_stop = check_stop
        self._limits_writing = False
        self._is_written = False
        """Whether Tune has written its state since the last snapshot."""

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Take up what people ask of the sweep, before Tune asks the search for trials."""
        if self._conductor.steering.take_up(self._conductor):
            write_state_next(self._conductor.controller)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Save a snapshot after Tune has handled an event and written its state on this machine."""
        if trials and not self._limits_writing:  # until now Tune has written its state at each turn
            self._limits_writing = self._is_written = True
            limit_state_writing(
                self._conductor.controller, _FREE_STATE_S, _MAX_STATE_SHARE, _LONGEST_STATE_PAUSE_S, self._note_written
            )
        self._log_dropped()
        self._save_snapshot(trials)
        self._conductor.steering.look(self._conductor)
        self._check_stop()
        have_ended = trials and all(trial.is_finished() for trial in trials)
        if have_ended and (len(trials) == self._conductor.steering.num_trials or self._is_over()):
            _await_trainables([self._paths_of(trial) for trial in trials])

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Save the state that Tune writes after its last turn."""
        self._save_snapshot(trials)

    def _is_over(self) -> bool:
        """Return whether no further trial begins, although fewer were made than the sweep asks for."""
        return self._record.why_over() is not None or self._conductor.controller.search_alg.is_finished()

    def _log_dropped(self) -> None:
        """Record the points that the search has dropped in this iteration."""
        if self._conductor.controller is not None:
            for dropped in self._conductor.controller.search_alg.take_dropped():
                self._conductor.log(dropped, "dropped", dropped.why)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the result of a trial that has ended by itself or was stopped.

        A trial that never began has a result only if somebody has asked for its stop: the sweep waits for it otherwise.
        """
        paths, by = self._paths_of(trial), self._conductor.steering.stopped_by.get(trial.trial_id)
        if not paths.config.is_file():
            if by is None:
                return
            write_record(paths.config, self._record.info.spec.trial_config(plain_values(trial.config)))
        why, added = self._conductor.why_stopped(trial.trial_id), read_added(paths)
        origin = {"added_by": added.by, "cloned_from": added.cloned_from} if added else {}
        end_unfinished(self._record, paths, TrialState.STOPPED, stopped=why, stopped_by=by, **origin)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the result of a trial that has failed and has no attempt left."""
        paths = self._paths_of(trial)
        if not paths.config.is_file():  # its trainable failed before it wrote the configuration
            write_record(paths.config, self._record.info.spec.trial_config(plain_values(trial.config)))
        paths.lease.unlink(missing_ok=True)
        why = f"gave up; the last failure: {words_of(error_of(trial))}"  # else `FailureCounter` has written a result
        end_unfinished(self._record, paths, TrialState.FAILED, error=why, failure="infrastructure")

    def _save_snapshot(self, trials: list[Any]) -> None:
        """Save a snapshot and write the answers whose effects it holds, if Tune has written its state in this turn."""
        if self._is_written:
            self._is_written = False
            save_snapshot(self._record.paths, staging_folder(trials[0]), self._conductor.state())
            self._conductor.steering.write_answers()

    def _note_written(self) -> None:
        self._is_written = True

    def _paths_of(self, trial: Any) -> TrialPaths:
        return self._record.paths.trial(trial.trial_id)


def cancel_unknown(record: SweepRecord) -> None:
    """End trials that Tune does not know: begun just before a driver was killed, and replaced since by other trials."""
    known = {path.name for path in record.paths.tune.iterdir() if path.is_dir()}
    for trial_id in record.paths.trial_ids():
        if trial_id not in known:
            paths = record.paths.trial(trial_id)
            end_unfinished(
                record, paths, TrialState.CANCELLED, error="lost with the driver; another trial took its place"
            )


def _await_trainables(trials: list[TrialPaths]) -> None:
    """Wait until ended trials have left their workers and closed their trackers: Tune kills a trainable after 10 s."""
    deadline = time.monotonic() + _CLOSING_S
    for paths in trials:
        while paths.lease.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        paths.lease.unlink(missing_ok=True)  # left by a trainable that was killed
