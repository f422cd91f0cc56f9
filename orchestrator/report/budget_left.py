"""Estimate when a sweep's budget will be spent."""

from collections.abc import Callable, Sequence

from orchestrator.record import TrialResult
from orchestrator.spec.search import Budget

_HOUR_S = 3600.0


class BudgetLeft:
    """Watches what trials spend, and tells how long the rest of the budget lasts at the present pace."""

    def __init__(self, budget: Budget, clock: Callable[[], float]) -> None:
        """
        Args:
            budget: the limits.
            clock: returns seconds.
        """
        self._budget = budget
        self._clock = clock
        self._first: tuple[float, dict[str, float]] | None = None
        """Time and amounts spent when a step was seen first."""
        self._last: tuple[float, dict[str, float]] | None = None

    def update(self, trials: Sequence[TrialResult]) -> None:
        """Take in what trials have spent by now."""
        if not any(trial.step for trial in trials):
            return
        spent = {
            "gpu_hours": sum(trial.gpu_seconds for trial in trials) / _HOUR_S,
            "tokens": float(sum(trial.tokens - trial.adopted_tokens for trial in trials)),
        }
        self._last = self._clock(), spent
        self._first = self._first or self._last

    def seconds(self) -> float | None:
        """Return the seconds until the first limit is reached; None if there is none, or nothing was spent yet.

        Hours that an earlier driver has used are not known here, so that the time may be shorter.
        """
        if self._first is None or self._last is None:
            return None
        (began, before), (now, spent) = self._first, self._last
        left = []
        if self._budget.wall_clock_hours is not None:
            left.append(self._budget.wall_clock_hours * _HOUR_S - (now - began))
        for name, limit in (("gpu_hours", self._budget.gpu_hours), ("tokens", self._budget.tokens)):
            pace = (spent[name] - before[name]) / (now - began) if now > began else 0.0
            if limit is not None and pace > 0:
                left.append((limit - spent[name]) / pace)
        return max(min(left), 0.0) if left else None
