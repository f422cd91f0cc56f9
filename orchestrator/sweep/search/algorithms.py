"""The experiment's space and algorithm in Ray Tune's terms."""

import copy
import math
from typing import Any

from optuna.trial import TrialState
from ray import tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.search_generator import SearchGenerator

from orchestrator.spec import SweepSpec
from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain
from orchestrator.spec.search import SearchSection
from orchestrator.spec.sections.scheduler import Brackets, Population
from orchestrator.sweep.search.drawn_points import DrawnPoints, Point
from orchestrator.sweep.tune_trial import plain_values


def tune_space(search: SearchSection) -> dict[str, Any]:
    """Dotted field -> Tune domain, of what Tune draws by itself: other searchers hold their space."""
    if search.algorithm != "random":
        return {}
    return {path: _domain(axis) for path, axis in search.space.items()}


def make_searcher(spec: SweepSpec, at_once: int) -> Searcher | SearchAlgorithm:
    """The algorithm, seeded, with so many trials at once. Tied values are resolved after it."""
    search = spec.search
    match search.algorithm:
        case "optuna":
            return Limiter(_optuna(search), at_once)
        case "hyperopt":
            from orchestrator.sweep.search.hyperopt import make_hyperopt

            return Limiter(make_hyperopt(search), at_once)
        case "bohb":
            from orchestrator.sweep.search.bohb import make_bohb

            return make_bohb(search, at_once)
        case _:  # under brackets, or in a population, all are there at once, and take turns
            all_there = isinstance(spec.scheduler, Brackets | Population)
            return Variants(search, 0 if all_there else at_once)


def make_search_algorithm(spec: SweepSpec, at_once: int, is_over: bool) -> SearchAlgorithm:
    """The searcher as Tune takes it: it draws trials until there are as many as the experiment says now.

    Args:
        spec: the experiment, which a resume may have given more trials.
        at_once: trials at a time.
        is_over: whether the budget is spent: then a restored search draws no further trial.
    """
    searcher = make_searcher(spec, at_once)
    if isinstance(searcher, Variants):
        searcher.is_over = is_over
        return searcher
    return Generator(searcher, spec.search.total_trials, is_over)


class Generator(SearchGenerator):  # type: ignore[misc]  # mypy skips ray
    """Makes trials of a searcher's points, as many as there are to be now, whatever was said before a resume."""

    def __init__(self, searcher: Searcher, num_trials: int, is_over: bool) -> None:
        """`is_over` says whether a restored search draws no further trial."""
        super().__init__(searcher)
        self._num_trials = num_trials
        self._is_over = is_over

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned."""
        super().set_state(state | {"total_samples": self._num_trials, "finished": self._is_over})


def worst_value(mode: str) -> float:
    """What a searcher is told of a trial that failed by its own values: worse than anything that can be measured.

    It is infinite. TPE, CMA-ES and BOHB only compare the values of trials, and a finite one could turn out to be better
    than that of a later trial that did not fail.
    """
    return math.inf if mode == "min" else -math.inf


class Limiter(ConcurrencyLimiter):  # type: ignore[misc]  # mypy skips ray
    """Keeps to its own limit after a resume, not to that of the workers of then."""

    def report_failure(self, trial_id: str) -> None:
        """Report the worst value for a trial that failed by its own values. Tune's own report of it is then ignored."""
        self.on_trial_complete(trial_id, {self.metric: worst_value(self.mode)})

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})


class Variants(BasicVariantGenerator):  # type: ignore[misc]  # mypy skips ray
    """Random draws, or a grid; before them the points to try first. Limited as `Limiter`.

    The points are put into Tune's trials: what Tune itself takes as points to try first knows no lists as values, and
    what it takes as a grid knows no fields that exist only with others.
    """

    def __init__(self, search: SearchSection, at_once: int) -> None:
        """`at_once` is 0 for no limit."""
        super().__init__(random_state=search.seed, max_concurrent=at_once)
        self.is_over = False
        """Whether a restored search draws no further trial."""
        self._search = search
        self._drawn = DrawnPoints(search)
        self._points = list(search.points()) if search.algorithm == "grid" else copy.deepcopy(search.first)

    def is_finished(self) -> bool:
        """Whether Tune may end its relays once no more trials come: trials that take turns still need theirs."""
        return bool(self._finished) and not (self._live_trials and self.max_concurrent == 0)

    def next_trial(self) -> Any:
        """The next trial, at a point that no other has; None where there is none at this moment."""
        trial = None if self._finished else super().next_trial()
        if trial is not None:
            first = [self._search.decode(plain_values(trial.config))]
            point = self._drawn.draw_new(
                lambda: self._points.pop(0) if self._points else first.pop() if first else self._draw(),
                lambda: None,
                lambda chosen: self._points.insert(0, chosen),
            )
            trial.set_config(point)
            trial.evaluated_params = dict(trial.config)
        return trial

    def _draw(self) -> Point:
        space = self._search.space
        drawn = {path: _domain(axis).sample(random_state=self._random_state) for path, axis in space.items()}
        return self._search.decode(plain_values(drawn))

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned, with the limit and the number of trials of now."""
        now = {"max_concurrent": self.max_concurrent, "_search": self._search, "is_over": self.is_over}
        super().set_state(state | now | {"_finished": self.is_over, "_total_samples": self._search.total_trials})
        for iterator in self._iterators:
            iterator.num_samples_left += self._search.total_trials - state["_total_samples"]


def _domain(axis: Axis) -> Any:
    drawn = axis.domain()
    if isinstance(drawn, IndexDomain):
        return tune.choice([*range(drawn.count)])
    if isinstance(drawn, FloatDomain):
        return (tune.loguniform if drawn.is_log else tune.uniform)(drawn.low, drawn.high)
    return (tune.lograndint if drawn.is_log else tune.randint)(drawn.low, drawn.high + 1)


def _optuna(search: SearchSection) -> "Optuna":
    from optuna.samplers import CmaEsSampler, TPESampler

    if search.sampler == "cmaes":
        sampler = CmaEsSampler(n_startup_trials=search.startup_trials or 1, seed=search.seed)
    else:
        sampler = TPESampler(n_startup_trials=search.startup_trials or 10, seed=search.seed)
    return Optuna(
        search,
        space=OptunaSpace(search),
        metric=search.metric,
        mode=search.resolved_mode,
        sampler=sampler,
        points_to_evaluate=[encode(search, point) for point in search.first],
    )


class Optuna(OptunaSearch):  # type: ignore[misc]  # mypy skips ray
    """Suggests no point twice. A draw that is discarded is a failed trial to Optuna, from which it learns nothing."""

    def __init__(self, search: SearchSection, **settings: Any) -> None:
        """`settings` are those of Tune's."""
        super().__init__(**settings)
        self._search = search
        self._drawn = DrawnPoints(search)

    def suggest(self, trial_id: str) -> Point | None:
        """A new point for a trial."""
        draw = super().suggest
        return self._drawn.draw_new(
            lambda: draw(trial_id),
            lambda: self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL),
            lambda point: self._ot_study.enqueue_trial(encode(self._search, point)),
        )


class OptunaSpace:
    """Asks an optuna trial for a point: for the fields that exist there, and no others. Pickled with the sweep."""

    def __init__(self, search: SearchSection) -> None:
        self._search = search

    def __call__(self, trial: Any) -> dict[str, Any]:
        point: dict[str, Any] = {}
        for path in by_depth(self._search):
            axis = self._search.space[path]
            if path not in self._search.active(point | {path: None}):
                continue
            point[path] = axis.decode(_suggest(trial, path, axis))
        return point


def _suggest(trial: Any, path: str, axis: Axis) -> Any:
    drawn = axis.domain()
    if isinstance(drawn, IndexDomain):
        return trial.suggest_categorical(path, [*range(drawn.count)])
    suggest = trial.suggest_float if isinstance(drawn, FloatDomain) else trial.suggest_int
    return suggest(path, drawn.low, drawn.high, log=drawn.is_log)


def by_depth(search: SearchSection) -> list[str]:
    """Fields in an order in which each comes after those that decide whether it exists."""
    return sorted(search.space, key=lambda path: len(search.ancestors(path)))


def encode(search: SearchSection, point: dict[str, Any]) -> dict[str, Any]:
    """What a searcher would have drawn for a point."""
    return {path: search.space[path].encode(value) for path, value in point.items()}
