"""Compare what the trials of a sweep have spent with its budget."""

import time
from typing import Any

from orchestrator.record import BudgetSpent, SweepPaths, TrialResult, write_record
from orchestrator.spec.search import Budget

_HOUR_S = 3600.0


class BudgetTracker:
    """Adds up what trials have spent, by their records, and the hours since the first step of any trial.

    It is pickled with the sweep. The time between two drivers, and the time in which workers load, do not count.
    """

    def __init__(self, budget: Budget) -> None:
        """Start with nothing spent and a stopped clock."""
        self.budget = budget
        self._seconds = 0.0
        self._clock_start_s: float | None = None
        self._gpu_seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def start_clock(self) -> None:
        """Start the clock, if it does not run."""
        if self._clock_start_s is None:
            self._clock_start_s = time.monotonic()

    @property
    def needs_clock(self) -> bool:
        """Whether the budget limits hours and the clock does not run yet."""
        return self.budget.wall_clock_hours is not None and self._clock_start_s is None

    @property
    def needs_records(self) -> bool:
        """Whether the budget depends on the records of trials, so that `count` must be called."""
        return self.budget.gpu_hours is not None or self.budget.tokens is not None

    def count(self, trial: TrialResult) -> None:
        """Count a trial as its record is now. Tokens that it took over from another trial do not count again."""
        self._gpu_seconds[trial.trial_id] = trial.gpu_seconds
        self._tokens[trial.trial_id] = trial.tokens - trial.adopted_tokens

    def spent(self) -> BudgetSpent | None:
        """Return the limit that is reached, or None."""
        budget = self.budget
        seconds = self._seconds + self._clock_s()
        if budget.wall_clock_hours is not None and seconds >= budget.wall_clock_hours * _HOUR_S:
            return BudgetSpent(
                limit="wall_clock_hours", allowed=budget.wall_clock_hours, spent=round(seconds / _HOUR_S, 6)
            )
        gpu_hours = sum(self._gpu_seconds.values()) / _HOUR_S
        if budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours:
            return BudgetSpent(limit="gpu_hours", allowed=budget.gpu_hours, spent=round(gpu_hours, 6))
        tokens = sum(self._tokens.values())
        if budget.tokens is not None and tokens >= budget.tokens:
            return BudgetSpent(limit="tokens", allowed=budget.tokens, spent=tokens)
        return None

    def _clock_s(self) -> float:
        return time.monotonic() - self._clock_start_s if self._clock_start_s is not None else 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with a stopped clock."""
        return {**self.__dict__, "_seconds": self._seconds + self._clock_s(), "_clock_start_s": None}


def record_spent(budget: BudgetTracker, paths: SweepPaths) -> BudgetSpent | None:
    """Return the limit that is reached now, and record it in the sweep's folder; None if there is none."""
    if budget.needs_clock and paths.first_step.is_file():
        budget.start_clock()
    spent = budget.spent()
    if spent is not None:
        write_record(paths.budget, spent)
    return spent
