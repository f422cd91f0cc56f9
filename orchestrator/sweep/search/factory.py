"""Make the search algorithm that an experiment asks for."""

from collections.abc import Callable, Sequence
from typing import Any, assert_never

from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.search_generator import SearchGenerator

from orchestrator.record import SweepRecord
from orchestrator.record.models import PriorSweep
from orchestrator.record.requests import unanswered
from orchestrator.spec import SweepSpec
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.search.ending import EndRule, Ends
from orchestrator.sweep.search.grid_random import GridRandom
from orchestrator.sweep.search.space import Point, worst_value
from orchestrator.sweep.search.unfit import MAX_DROPPED, Dropped, nothing_fits
from orchestrator.sweep.tune_trial import plain_values
from orchestrator.sweep.turns import trials_take_turns


def make_search_algorithm(
    record: SweepRecord, max_concurrent: int, unfit_reason: Callable[[Point], str | None] | None = None
) -> SearchAlgorithm:
    """Return the algorithm in the form that Tune takes. It makes as many trials as the experiment asks for now.

    Args:
        record: the sweep; a resume may have increased its number of trials. If its budget is spent or it has ended
            itself, a restored search draws no further trial.
        max_concurrent: number of trials at a time.
        unfit_reason: returns why a point cannot fit into memory, so that it is dropped; None drops none.
    """
    spec, is_over, ends = record.info.spec, record.why_over() is not None, EndRule(record).ends
    hold_open = bool(unanswered(record.paths))
    searcher = make_searcher(spec, max_concurrent, record.info.prior_sweeps)
    if isinstance(searcher, GridRandom):
        searcher.is_over, searcher.ends, searcher.hold_open = is_over, ends, hold_open
        searcher.unfit_reason = unfit_reason
        return searcher
    generator = TrialGenerator(searcher, spec.search, is_over, ends, unfit_reason)
    generator.hold_open = hold_open
    return generator


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

    def __init__(
        self,
        searcher: Searcher,
        search: SearchSection,
        is_over: bool,
        ends: Ends,
        unfit_reason: Callable[[Point], str | None] | None = None,
    ) -> None:
        """
        Args:
            searcher: suggests the points.
            search: the section of the experiment, with the number of trials in all.
            is_over: whether a restored search draws no further trial.
            ends: says whether the search is over, whenever a trial has ended.
            unfit_reason: see `make_search_algorithm`.
        """
        super().__init__(searcher)
        self._num_trials = search.total_trials
        self._num_points = search.num_points
        self._is_over = is_over
        self._ends = ends
        self._unfit_reason = unfit_reason
        self._dropped: list[Dropped] = []
        self._num_dropped = 0
        self._running: dict[str, Point] = {}
        """Trials that were drawn and have not ended, with their points."""
        self._ended: list[str] = []
        """Trials that have ended, in that order."""
        self.hold_open = False
        """Whether requests wait that may add trials, so that Tune must not end."""

    def is_finished(self) -> bool:
        """Return whether Tune may end once no trial runs."""
        return super().is_finished() and not self.hold_open

    def take_in(self, trial_id: str, point: Point | None) -> None:
        """Take in a trial that somebody has asked for.

        Args:
            trial_id: the trial.
            point: its point; None if that is outside the search space.
        """
        self.searcher.take_in(trial_id, point)
        if point is not None:
            self._running[trial_id] = dict(point)

    def set_aside(self, trial_id: str) -> None:
        """Let another trial have the slot of one that is paused by request."""
        self.searcher.set_aside(trial_id)

    def take_back(self, trial_id: str) -> None:
        """Keep a slot for a trial that continues."""
        self.searcher.take_back(trial_id)

    def forget(self, trial_id: str) -> None:
        """Learn nothing from a trial that is stopped by request."""
        if isinstance(self.searcher, Limiter):
            self.searcher.forget(trial_id)

    def extend(self, search: SearchSection) -> None:
        """Go on with another number of trials."""
        if search.total_trials > self._num_trials:
            self._num_trials = self._total_samples = search.total_trials
            self._finished = False

    def next_trial(self) -> Any:
        """Return the next trial; None where there is none at the moment.

        Raises:
            SweepError: many points in a row, or all points, cannot fit into memory.
        """
        reason = ""
        for _ in range(MAX_DROPPED):
            trial = None if super().is_finished() else super().next_trial()
            if trial is None:
                return None
            point = plain_values(trial.config)
            unfit = None if self._unfit_reason is None else self._unfit_reason(point)
            if unfit is None:
                self._running[trial.trial_id] = point
                return trial
            reason = unfit
            self._drop(trial.trial_id, reason)
            if not self._counter and super().is_finished():
                break
        raise nothing_fits(self._num_dropped, reason)

    def take_dropped(self) -> list[Dropped]:
        """Return the points that were dropped since the last call."""
        taken, self._dropped = self._dropped, []
        return taken

    def _drop(self, trial_id: str, reason: str) -> None:
        """Drop the point that was drawn last: the searcher learns that it is bad, and draws another one for it."""
        self._counter -= 1
        self._num_dropped += 1
        self._dropped.append(Dropped(trial_id, reason))
        self.searcher.drop(trial_id)
        if self._counter + self._num_dropped >= self._num_points:  # no other point is left
            self.set_finished()

    def why_chosen(self, trial_id: str) -> str | None:
        """Return the searcher's reason for a trial's values; None from a searcher that gives none."""
        explain = getattr(getattr(self.searcher, "searcher", None), "why_chosen", None)
        return explain(trial_id) if explain else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take over the end of a trial; it may be that of the search."""
        super().on_trial_complete(trial_id, result, error)
        self._running.pop(trial_id, None)
        self._ended.append(trial_id)
        if not super().is_finished() and self._ends(self._ended, self._running.values(), error):
            self.set_finished()

    def get_state(self) -> dict[str, Any]:
        """Return the state that a resume needs, without that of the searcher."""
        return {
            **super().get_state(),
            "running": self._running,
            "ended": self._ended,
            "num_dropped": self._num_dropped,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state of `get_state`, with the current number of trials."""
        self._running, self._ended = state.get("running", {}), state.get("ended", [])
        self._num_dropped = state.get("num_dropped", 0)
        super().set_state(state | {"total_samples": self._num_trials, "finished": self._is_over})


class Limiter(ConcurrencyLimiter):  # type: ignore[misc]  # mypy skips ray
    """Limits the number of concurrent trials. After a resume the limit is that of the current workers."""

    def __init__(self, searcher: Searcher, max_concurrent: int) -> None:
        """Take the searcher and its limit."""
        super().__init__(searcher, max_concurrent)
        self._strangers: set[str] = set()
        """Trials that somebody has asked for and of which the searcher does not know."""

    def take_in(self, trial_id: str, point: Point | None) -> None:
        """Count a trial that somebody has asked for, and tell the searcher of its point, where it can learn from it."""
        self.live_trials.add(trial_id)
        tell = getattr(self.searcher, "take_in", None)
        if point is not None and tell is not None:
            tell(trial_id, point)
        else:
            self._strangers.add(trial_id)

    def set_aside(self, trial_id: str) -> None:
        """Do not count a trial that is paused by request."""
        self.live_trials.discard(trial_id)

    def take_back(self, trial_id: str) -> None:
        """Count a trial again that continues."""
        self.live_trials.add(trial_id)

    def forget(self, trial_id: str) -> None:
        """Have the searcher learn nothing from a trial. Tune's later report is then ignored."""
        self.live_trials.add(trial_id)
        if trial_id not in self._strangers and (forget := getattr(self.searcher, "forget", None)):
            forget(trial_id)
        self.on_trial_complete(trial_id, None, error=True)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an evaluation on, if the searcher knows the trial."""
        if trial_id not in self._strangers:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end of a trial on, if the searcher knows the trial."""
        if trial_id in self._strangers:
            self.live_trials.discard(trial_id)
        else:
            super().on_trial_complete(trial_id, result, error)

    def report_failure(self, trial_id: str) -> None:
        """Report the worst value for a trial that failed by its own values. Tune's later report is then ignored."""
        self.on_trial_complete(trial_id, {self.metric: worst_value(self.mode)})

    def drop(self, trial_id: str) -> None:
        """Report the worst value for a point that cannot fit into memory."""
        self.report_failure(trial_id)

    def count_as(self, trial_id: str, value: float) -> None:
        """Have a stopped trial count by the forecast of its end, where the algorithm can."""
        if trial_id not in self._strangers and (count_as := getattr(self.searcher, "count_as", None)):
            count_as(trial_id, value)

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state of `get_state`, with the current limit."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})
