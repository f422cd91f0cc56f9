"""The trials that have no slot: those that have not started, and those that wait after a report."""

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial

from orchestrator.record import TrialPaths


class WaitingTrials:
    """Knows which trials wait, and marks them in their folders (`.paused`), so that they give their slots back."""

    def __init__(self, paths_of: Callable[[Any], TrialPaths]) -> None:
        """Start with none.

        Args:
            paths_of: returns the paths of a Tune trial.
        """
        self.unstarted: set[str] = set()
        """Trials that were added as PAUSED and have not started."""
        self.after_report: set[str] = set()
        """Trials that wait for others, for a slot or for somebody, after a report."""
        self._paths_of = paths_of

    def set_first_status(self, trial: Any, is_held: bool) -> None:
        """Set the status of a trial that Tune is about to add, and that has not ended.

        Args:
            trial: the trial.
            is_held: whether a trial that has not started waits until it is chosen.
        """
        if trial.trial_id not in self.after_report:
            self._paths_of(trial).paused.unlink(missing_ok=True)
            if not is_held:
                return
            self.unstarted.add(trial.trial_id)
        trial.set_status(Trial.PAUSED)

    def wait(self, trial: Any) -> None:
        """Have a trial wait and give its slot back."""
        self.after_report.add(trial.trial_id)
        self._paths_of(trial).paused.touch()

    def start(self, trial: Any) -> bool:
        """Have a trial start or continue; return whether it continues after a report."""
        self.unstarted.discard(trial.trial_id)
        if trial.trial_id not in self.after_report:
            return False
        self.after_report.discard(trial.trial_id)
        self._paths_of(trial).paused.unlink(missing_ok=True)
        return True

    def end(self, trial: Any) -> None:
        """Forget a trial that has ended."""
        self.unstarted.discard(trial.trial_id)
        self.after_report.discard(trial.trial_id)
        self._paths_of(trial).paused.unlink(missing_ok=True)

    def first_unstarted(self, trials: list[Any]) -> Any:
        """Return the first trial that has not started; None if all have."""
        return next((each for each in trials if each.trial_id in self.unstarted and each.status == Trial.PAUSED), None)


def next_in_order(trials: list[Any], num_slots: int, held: set[str], active: tuple[str, ...]) -> Any:
    """Return the next trial where trials do not take turns: one that waits for a slot, or a new one.

    Args:
        trials: all trials, in their order.
        num_slots: number of trials that run at a time.
        held: trials that somebody has paused.
        active: statuses of trials that have a slot.
    """
    if sum(trial.status in active for trial in trials) < num_slots:
        for trial in trials:
            if trial.status == Trial.PAUSED and trial.trial_id not in held:
                return trial
    return next((trial for trial in trials if trial.status == Trial.PENDING), None)
