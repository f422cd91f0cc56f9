"""Reports that wait until the scheduler may see them, in the order of `report_order`."""

import time
from typing import Any

from ray.tune.schedulers import TrialScheduler

from orchestrator.sweep.schedulers.report_order import ReportOrder
from orchestrator.sweep.tune_trial import COMPLETE
from orchestrator.upstream import continue_training

Report = dict[str, Any]
"""A report of a trial, see `workers.trainable`."""


class ReportQueue:
    """Holds reports, including the last reports of complete trials. It is pickled without them: they come again."""

    def __init__(self, num_slots: int, num_trials: int) -> None:
        """
        Args:
            num_slots: number of trials that run at a time.
            num_trials: number of trials of the sweep.
        """
        self._order = ReportOrder(num_slots, num_trials)
        self._held: dict[str, tuple[Any, Report]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}}

    def resume(self, num_slots: int, num_trials: int, trials: dict[str, Any]) -> None:
        """Continue after a driver was lost, with all trials that it knew."""
        self._order.resume(num_slots, num_trials)
        for trial in trials.values():
            self.add(trial)

    def add(self, trial: Any) -> None:
        """Add a trial. If it ended under an earlier driver and its end was not processed, its last report is held."""
        self._order.add(trial.trial_id)
        if not trial.is_finished():
            return
        if trial.last_result.get(COMPLETE) and self._order.is_running(trial.trial_id):
            self.hold(trial, trial.last_result)
        else:
            self._order.end(trial.trial_id, trial.last_result.get("step"))

    def await_no_more(self) -> None:
        """Note that no trial comes after those that were added."""
        self._order.await_no_more()

    def hold(self, trial: Any, report: Report) -> None:
        """Hold a report until it is due."""
        self._held[trial.trial_id] = trial, report
        self._order.report(trial.trial_id, report["step"], time.monotonic(), report["seconds"])

    def take(self, all_are_due: bool) -> list[tuple[Any, Report]]:
        """Return the reports of the next moment that is due, with their trials; none if no report is due."""
        names = [*self._held] if all_are_due else self._order.next(time.monotonic())
        return [self._held.pop(name) for name in names]

    def expect(self, num_trials: int) -> None:
        """Note how many trials the sweep has now."""
        self._order.num_trials = num_trials

    def set_aside(self, trial: Any) -> None:
        """Note that a trial that waits for a slot gets none until `rejoin`."""
        self._order.set_aside(trial.trial_id)

    def rejoin(self, trial: Any, step: int) -> None:
        """Note that a trial that was set aside, or whose end was noted at a step, will continue from there."""
        self._order.rejoin(trial.trial_id, step)

    def continues(self, trial: Any) -> None:
        """Note that a trial continues after its report was processed."""
        self._order.processed(trial.trial_id)

    def end(self, trial: Any) -> None:
        """Note that a trial has ended or will end."""
        self._held.pop(trial.trial_id, None)
        self._order.end(trial.trial_id)

    def drop(self, trial: Any) -> None:
        """Drop the report of a trial that restarts and will make the report again."""
        if self._held.pop(trial.trial_id, None) is not None:
            self._order.processed(trial.trial_id)


def action_of(is_stopped: bool, pauses: bool) -> str:
    """Return Tune's name for the answer to a report."""
    if is_stopped:
        return str(TrialScheduler.STOP)
    return str(TrialScheduler.PAUSE if pauses else TrialScheduler.CONTINUE)


def answer_late(controller: Any, trial: Any, is_stopped: bool, pauses: bool) -> None:
    """Answer a report that has waited, through Tune's wrapper of its controller."""
    if is_stopped:
        controller.stop_trial(trial)
    elif pauses:
        controller.pause_trial(trial)
    else:
        continue_training(controller, trial)
