"""BOHB in Ray Tune's terms (extra `bohb`): densities of good and bad points at the furthest rung with enough."""

import logging
from typing import Any

import ConfigSpace
from ray.tune.search.bohb import TuneBOHB

from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.rng import OwnRng
from orchestrator.sweep.search.algorithms import by_depth, encode, worst_value
from orchestrator.sweep.search.drawn_points import DrawnPoints, Point
from orchestrator.sweep.tune_trial import plain_values


def make_bohb(search: SearchSection, at_once: int) -> "BohbSearch":
    """The searcher, seeded, with so many trials at once, those that wait at a rung not counted."""
    logging.getLogger("hpbandster").setLevel(logging.ERROR)
    return BohbSearch(
        search,
        space=_space(search),
        bohb_config={"min_points_in_model": search.startup_trials},
        metric=search.metric,
        mode=search.resolved_mode,
        points_to_evaluate=[encode(search, point) for point in search.first] or None,
        seed=search.seed,
        max_concurrent=at_once,
    )


class BohbSearch(TuneBOHB):  # type: ignore[misc]  # mypy skips ray
    """Suggests points of the space, with random numbers of its own: hpbandster draws from the process's."""

    def __init__(self, search: SearchSection, **settings: Any) -> None:
        """`settings` are those of Tune's."""
        super().__init__(**settings)
        self._search = search
        self._draws = OwnRng(search.seed)
        self._drawn = DrawnPoints(search)

    def suggest(self, trial_id: str) -> Point | None:
        """A new point for a trial; None where as many run as may."""
        return self._drawn.draw_new(lambda: self._draw(trial_id), lambda: self.running.discard(trial_id), self._place)

    def _draw(self, trial_id: str) -> Point | None:
        with self._draws.in_use():
            drawn = super().suggest(trial_id)
        return None if drawn is None else self._search.decode(plain_values(drawn))

    def _place(self, point: Point) -> None:
        """Add a point to those that are drawn before the model's."""
        self._points_to_evaluate = [encode(self._search, point)]

    def report_failure(self, trial_id: str, rung: float) -> None:
        """Report the worst value for a trial that failed by its own values before it came to this rung."""
        worst = {self.metric: worst_value(self.mode), "hyperband_info": {"budget": rung}}
        self.on_trial_result(trial_id, worst)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See Tune. A missing value of a field that does not exist is drawn from those of others."""
        with self._draws.in_use():
            super().on_trial_result(trial_id, result)

    def restore(self, checkpoint_path: str) -> None:
        """See Tune; the limit is that of the workers of now."""
        at_once: int = self.__dict__["_max_concurrent"]
        super().restore(checkpoint_path)
        self.set_max_concurrency(at_once)


def _space(search: SearchSection) -> Any:
    space, made = ConfigSpace.ConfigurationSpace(), {}
    for path in by_depth(search):
        made[path] = _parameter(path, search.space[path])
        space.add(made[path])
        for parent, values in (search.space[path].when or {}).items():
            places = [search.space[parent].encode(value) for value in values]
            space.add(ConfigSpace.InCondition(made[path], made[parent], places))
    return space


def _parameter(path: str, axis: Axis) -> Any:
    drawn = axis.domain()
    if isinstance(drawn, IndexDomain):
        return ConfigSpace.CategoricalHyperparameter(path, [*range(drawn.count)])
    kind = (
        ConfigSpace.UniformFloatHyperparameter
        if isinstance(drawn, FloatDomain)
        else ConfigSpace.UniformIntegerHyperparameter
    )
    return kind(path, lower=drawn.low, upper=drawn.high, log=drawn.is_log)
