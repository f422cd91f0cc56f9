"""Make the search algorithm that an experiment asks for."""

from collections.abc import Sequence
from typing import Any, assert_never

from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.search_generator import SearchGenerator

from orchestrator.record.models import PriorSweep
from orchestrator.spec import SweepSpec
from orchestrator.sweep.search.grid_random import GridRandom
from orchestrator.sweep.search.space import worst_value
from orchestrator.sweep.turns import trials_take_turns


def make_search_algorithm(
    spec: SweepSpec, max_concurrent: int, is_budget_spent: bool, prior_sweeps: Sequence[PriorSweep] = ()
) -> SearchAlgorithm:
    """Return the algorithm in the form that Tune takes. It makes as many trials as the experiment asks for now.

    Args:
        spec: the experiment; a resume may have increased its number of trials.
        max_concurrent: number of trials at a time.
        is_budget_spent: whether a restored search draws no further trial.
        prior_sweeps: earlier sweeps whose results are evidence.
    """
    searcher = make_searcher(spec, max_concurrent, prior_sweeps)
    if isinstance(searcher, GridRandom):
        searcher.is_budget_spent = is_budget_spent
        return searcher
    return TrialGenerator(searcher, spec.search.total_trials, is_budget_spent)


def make_searcher(
    spec: SweepSpec, max_concurrent: int, prior_sweeps: Sequence[PriorSweep] = ()
) -> Searcher | SearchAlgorithm:
    """Return the algorithm, seeded and limited to `max_concurrent` trials. Tied values are resolved after it."""
    search, algorithm = spec.search, spec.search.algorithm
    match algorithm:
        case "auto" if search.space:
            from orchestrator.sweep.search.auto import Auto

            return Limiter(Auto(search, prior_sweeps), max_concurrent)
        case "auto" | "grid" | "random":
            # Trials that take turns must all be there from the start.
            return GridRandom(search, 0 if trials_take_turns(spec.scheduler) else max_concurrent)
        case "optuna":
            from orchestrator.sweep.search.optuna import make_optuna

            return Limiter(make_optuna(search, prior_sweeps), max_concurrent)
        case "hyperopt":
            from orchestrator.sweep.search.hyperopt import make_hyperopt

            return Limiter(make_hyperopt(search), max_concurrent)
        case "bohb":
            from orchestrator.sweep.search.bohb import make_bohb

            return make_bohb(search, max_concurrent)
        case _:
            assert_never(algorithm)


class TrialGenerator(SearchGenerator):  # type: ignore[misc]  # mypy skips ray
    """Makes trials of a searcher's points. After a resume their number is the one that the experiment has now."""

    def __init__(self, searcher: Searcher, num_trials: int, is_budget_spent: bool) -> None:
        """
        Args:
            searcher: suggests the points.
            num_trials: number of trials in all.
            is_budget_spent: whether a restored search draws no further trial.
        """
        super().__init__(searcher)
        self._num_trials = num_trials
        self._is_budget_spent = is_budget_spent

    def why_chosen(self, trial_id: str) -> str | None:
        """Return the searcher's reason for a trial's values; None from a searcher that gives none."""
        explain = getattr(getattr(self.searcher, "searcher", None), "why_chosen", None)
        return explain(trial_id) if explain else None

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state of `get_state`, with the current number of trials."""
        super().set_state(state | {"total_samples": self._num_trials, "finished": self._is_budget_spent})


class Limiter(ConcurrencyLimiter):  # type: ignore[misc]  # mypy skips ray
    """Limits the number of concurrent trials. After a resume the limit is that of the current workers."""

    def report_failure(self, trial_id: str) -> None:
        """Report the worst value for a trial that failed by its own values. Tune's later report is then ignored."""
        self.on_trial_complete(trial_id, {self.metric: worst_value(self.mode)})

    def count_as(self, trial_id: str, value: float) -> None:
        """Have a stopped trial count by the forecast of its end, where the algorithm can."""
        if count_as := getattr(self.searcher, "count_as", None):
            count_as(trial_id, value)

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state of `get_state`, with the current limit."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})
