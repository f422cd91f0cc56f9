"""Reports of trials that wait until the scheduler is to hear them, in the order of `moments`."""

import time
from typing import Any

from orchestrator.sweep.schedulers.moments import Moments
from orchestrator.sweep.tune_trial import COMPLETE

Result = dict[str, Any]
"""What a trial reports, see `relay`."""


class Reports:
    """Holds reports, the last ones of complete trials among them. Pickled without them: they come again."""

    def __init__(self, at_once: int, total: int) -> None:
        """
        Args:
            at_once: trials that have a slot.
            total: trials of the sweep.
        """
        self._moments = Moments(at_once, total)
        self._held: dict[str, tuple[Any, Result]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}}

    def resume(self, at_once: int, total: int, trials: dict[str, Any]) -> None:
        """Go on after a driver was lost, with all trials that it knew."""
        self._moments.resume(at_once, total)
        for trial in trials.values():
            self.add(trial)

    def add(self, trial: Any) -> None:
        """Take in a trial; one that has ended under an earlier driver ends here too, if that was not heard."""
        self._moments.add(trial.trial_id)
        if not trial.is_finished():
            return
        if trial.last_result.get(COMPLETE) and self._moments.is_running(trial.trial_id):
            self.hold(trial, trial.last_result)
        else:
            self._moments.end(trial.trial_id, trial.last_result.get("step"))

    def hold(self, trial: Any, result: Result) -> None:
        """Keep a report until it is due."""
        self._held[trial.trial_id] = trial, result
        self._moments.report(trial.trial_id, result["step"], time.monotonic(), result["seconds"])

    def take(self, all_are_due: bool) -> tuple[Any, Result] | None:
        """Give out the next report that is due."""
        name = next(iter(self._held), None) if all_are_due else self._moments.next(time.monotonic())
        return None if name is None else self._held.pop(name)

    def goes_on(self, trial: Any) -> None:
        """The trial of a report that was heard goes on."""
        self._moments.heard(trial.trial_id)

    def end(self, trial: Any) -> None:
        """A trial has ended, or is to end."""
        self._held.pop(trial.trial_id, None)
        self._moments.end(trial.trial_id)

    def forget(self, trial: Any) -> None:
        """Drop the report of a trial that starts anew, and makes it again."""
        if self._held.pop(trial.trial_id, None) is not None:
            self._moments.heard(trial.trial_id)
