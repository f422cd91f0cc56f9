"""BOHB under Ray Tune (extra `bohb`): it models good and bad points at the furthest rung that has enough of them."""

import logging
from typing import Any, assert_never

import ConfigSpace
from ray.tune.search.bohb import TuneBOHB

from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain, IntDomain
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.rng import IsolatedRng
from orchestrator.sweep.search.drawn_points import DrawnPoints
from orchestrator.sweep.search.space import Point, by_depth, encode, worst_value
from orchestrator.sweep.tune_trial import plain_values


def make_bohb(search: SearchSection, max_concurrent: int) -> "BohbSearch":
    """Return the searcher, seeded. Trials that wait at a rung do not count towards `max_concurrent`."""
    logging.getLogger("hpbandster").setLevel(logging.ERROR)
    return BohbSearch(
        search,
        space=_space(search),
        bohb_config={"min_points_in_model": search.startup_trials},
        metric=search.metric,
        mode=search.resolved_mode,
        points_to_evaluate=[encode(search, point) for point in search.first] or None,
        seed=search.seed,
        max_concurrent=max_concurrent,
    )


class BohbSearch(TuneBOHB):  # type: ignore[misc]  # mypy skips ray
    """Suggests points of the space. It has its own random state: hpbandster draws from the global generators."""

    def __init__(self, search: SearchSection, **settings: Any) -> None:
        """Take the experiment's search section, and in `settings` the arguments of Tune's `TuneBOHB`."""
        super().__init__(**settings)
        self._search = search
        self._rng = IsolatedRng(search.seed)
        self._drawn = DrawnPoints(search)

    def suggest(self, trial_id: str) -> Point | None:
        """Return a new point for a trial; None where as many trials run as may."""
        return self._drawn.draw_new(lambda: self._draw(trial_id), lambda: self.running.discard(trial_id), self._enqueue)

    def _draw(self, trial_id: str) -> Point | None:
        with self._rng.in_use():
            drawn = super().suggest(trial_id)
        return None if drawn is None else self._search.decode(plain_values(drawn))

    def _enqueue(self, point: Point) -> None:
        """Make a point the next one that is drawn, before those of the model."""
        self._points_to_evaluate = [encode(self._search, point)]

    def report_failure(self, trial_id: str, rung: float) -> None:
        """Report the worst value for a trial that failed by its own values before it reached this rung."""
        worst = {self.metric: worst_value(self.mode), "hyperband_info": {"budget": rung}}
        self.on_trial_result(trial_id, worst)

    def drop(self, trial_id: str) -> None:
        """Forget a point that cannot fit into memory: it has reached no rung. It is not drawn again."""
        self.on_trial_complete(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a report on. For a field that does not exist in the trial, the model draws a value of other trials."""
        with self._rng.in_use():
            super().on_trial_result(trial_id, result)

    def restore(self, checkpoint_path: str) -> None:
        """Restore a saved state, with the limit of the current workers."""
        max_concurrent: int = self.__dict__["_max_concurrent"]
        super().restore(checkpoint_path)
        self.set_max_concurrency(max_concurrent)


def _space(search: SearchSection) -> Any:
    space, parameters = ConfigSpace.ConfigurationSpace(), {}
    for path in by_depth(search):
        parameters[path] = _parameter(path, search.space[path])
        space.add(parameters[path])
        for parent, values in (search.space[path].when or {}).items():
            encoded = [search.space[parent].encode(value) for value in values]
            space.add(ConfigSpace.InCondition(parameters[path], parameters[parent], encoded))
    return space


def _parameter(path: str, axis: Axis) -> Any:
    match drawn := axis.domain():
        case IndexDomain():
            return ConfigSpace.CategoricalHyperparameter(path, [*range(drawn.count)])
        case FloatDomain():
            kind = ConfigSpace.UniformFloatHyperparameter
        case IntDomain():
            kind = ConfigSpace.UniformIntegerHyperparameter
        case _:
            assert_never(drawn)
    return kind(path, lower=drawn.low, upper=drawn.high, log=drawn.is_log)
