"""Optuna's TPE and CMA-ES under Ray Tune."""

from collections.abc import Sequence
from typing import Any, assert_never

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import CmaEsSampler, TPESampler
from optuna.trial import TrialState, create_trial
from ray.tune.search.optuna import OptunaSearch

from orchestrator.record.models import PriorSweep
from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain, IntDomain
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.search.drawn_points import DrawnPoints
from orchestrator.sweep.search.prior_evidence import first_points
from orchestrator.sweep.search.space import Point, by_depth, encode


def make_optuna(search: SearchSection, prior_sweeps: Sequence[PriorSweep] = ()) -> "Optuna":
    """Return the searcher, seeded. It tries the best points of earlier sweeps first; their results are on other data,
    so the model does not see them."""
    first = [*search.first, *first_points(prior_sweeps, search.resolved_mode)]
    match search.sampler:
        case "cmaes":
            sampler = CmaEsSampler(n_startup_trials=search.startup_trials or 1, seed=search.seed)
        case "tpe" | None:
            sampler = TPESampler(n_startup_trials=search.startup_trials or 10, seed=search.seed)
        case _:
            assert_never(search.sampler)
    return Optuna(
        search,
        space=OptunaSpace(search),
        metric=search.metric,
        mode=search.resolved_mode,
        sampler=sampler,
        points_to_evaluate=[encode(search, point) for point in first],
    )


class Optuna(OptunaSearch):  # type: ignore[misc]  # mypy skips ray
    """Suggests no point twice. A discarded draw is a failed trial to Optuna, from which it learns nothing."""

    def __init__(self, search: SearchSection, **settings: Any) -> None:
        """Take the experiment's search section, and in `settings` the arguments of Tune's `OptunaSearch`."""
        super().__init__(**settings)
        self._search = search
        self._drawn = DrawnPoints(search)
        self._added: dict[str, Point] = {}
        """Trials that somebody has asked for, with their points."""

    def take_in(self, trial_id: str, point: Point) -> None:
        """Take in a trial that somebody has asked for. The model sees it once it has its result."""
        self._drawn.see(point)
        self._added[trial_id] = point

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an evaluation on, of a trial that Optuna has suggested."""
        if trial_id not in self._added:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end of a trial on."""
        if trial_id not in self._added:
            super().on_trial_complete(trial_id, result, error)
        elif result:
            drawn = encode(self._search, self._added[trial_id])
            space = {path: _distribution(self._search.space[path]) for path in drawn}
            self._ot_study.add_trial(create_trial(value=result[self.metric], params=drawn, distributions=space))

    def suggest(self, trial_id: str) -> Point | None:
        """Return a new point for a trial."""
        draw = super().suggest
        return self._drawn.draw_new(
            lambda: draw(trial_id),
            lambda: self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL),
            lambda point: self._ot_study.enqueue_trial(encode(self._search, point)),
        )


class OptunaSpace:
    """Draws a point from an Optuna trial: only the fields that exist there. It is pickled with the sweep."""

    def __init__(self, search: SearchSection) -> None:
        self._search = search

    def __call__(self, trial: Any) -> Point:
        point: Point = {}
        for path in by_depth(self._search):
            axis = self._search.space[path]
            if path not in self._search.active(point | {path: None}):
                continue
            point[path] = axis.decode(_suggest(trial, path, axis))
        return point


def _distribution(axis: Axis) -> BaseDistribution:
    """Return what `_suggest` draws from."""
    match drawn := axis.domain():
        case IndexDomain():
            return CategoricalDistribution([*range(drawn.count)])
        case FloatDomain():
            return FloatDistribution(drawn.low, drawn.high, log=drawn.is_log)
        case IntDomain():
            return IntDistribution(drawn.low, drawn.high, log=drawn.is_log)
        case _:
            assert_never(drawn)


def _suggest(trial: Any, path: str, axis: Axis) -> Any:
    match drawn := axis.domain():
        case IndexDomain():
            return trial.suggest_categorical(path, [*range(drawn.count)])
        case FloatDomain():
            return trial.suggest_float(path, drawn.low, drawn.high, log=drawn.is_log)
        case IntDomain():
            return trial.suggest_int(path, drawn.low, drawn.high, log=drawn.is_log)
        case _:
            assert_never(drawn)
