"""HyperOpt's TPE under Ray Tune (extra `hyperopt`)."""

import math
from typing import Any, assert_never

from hyperopt import hp
from hyperopt.fmin import generate_trial
from hyperopt.pyll import scope
from ray.tune.search.hyperopt import HyperOptSearch

from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain, IntDomain
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.search.drawn_points import DrawnPoints
from orchestrator.sweep.search.space import Point, by_depth, encode
from orchestrator.sweep.tune_trial import plain_values

_POINT, _INDEX = "point", "place"


def make_hyperopt(search: SearchSection) -> "HyperOpt":
    """Return the searcher, seeded."""
    return HyperOpt(
        search,
        space={_POINT: _space(search)},
        metric=search.metric,
        mode=search.resolved_mode,
        points_to_evaluate=[encode(search, point) for point in search.first] or None,
        n_initial_points=search.startup_trials or 20,
        random_state_seed=search.seed,
    )


class HyperOpt(HyperOptSearch):  # type: ignore[misc]  # mypy skips ray
    """Suggests points of the space. A field that exists only with others is drawn only where it exists."""

    def __init__(self, search: SearchSection, **settings: Any) -> None:
        """Take the experiment's search section, and in `settings` the arguments of Tune's `HyperOptSearch`."""
        super().__init__(**settings)
        self._search = search
        self._drawn = DrawnPoints(search)
        self._is_enqueued = False
        """Whether the next draw is a point that `_enqueue` has added behind the points to try first."""
        for given in self._hpopt_trials.trials:
            self._add_absent_fields(given)

    def suggest(self, trial_id: str) -> Point | None:
        """Return a new point for a trial. HyperOpt ignores a discarded draw, as it ignores a failed trial."""
        return self._drawn.draw_new(
            lambda: self._draw(trial_id), lambda: self.on_trial_complete(trial_id, error=True), self._enqueue
        )

    def _draw(self, trial_id: str) -> Point:
        suggested = super().suggest(trial_id)
        if self._is_enqueued:
            self._points_to_evaluate, self._is_enqueued = 0, False
        return self._search.decode(plain_values(_flatten(suggested[_POINT])))

    def _enqueue(self, point: Point) -> None:
        """Add a point as Tune adds points to try first. All of those have been drawn by now."""
        (number,) = self._hpopt_trials.new_trial_ids(1)
        given = generate_trial(number, encode(self._search, point))
        self._add_absent_fields(given)
        self._hpopt_trials.insert_trial_doc(given)
        self._hpopt_trials.refresh()
        self._points_to_evaluate, self._is_enqueued = len(self._hpopt_trials.trials), True

    def _add_absent_fields(self, given: dict[str, Any]) -> None:
        """Add the fields that do not exist at a given point, each with an empty list of draws."""
        for drawn in (given["misc"]["idxs"], given["misc"]["vals"]):
            for path in self._search.space:
                drawn.setdefault(path, [])


def _space(search: SearchSection) -> dict[str, Any]:
    """Return field -> HyperOpt node. A listed value contains the nodes of the fields that exist with it."""
    nodes: dict[str, Any] = {}
    for path in reversed(by_depth(search)):
        axis = search.space[path]
        children = {child: nodes[child] for child, other in search.space.items() if other.parent == path}
        nodes[path] = _node(search, path, axis, children)
    return {path: nodes[path] for path, axis in search.space.items() if axis.parent is None}


def _node(search: SearchSection, path: str, axis: Axis, children: dict[str, Any]) -> Any:
    match drawn := axis.domain():
        case IndexDomain():
            options = [
                {_INDEX: index}
                | {child: node for child, node in children.items() if _exists_with(search.space[child], value)}
                for index, value in enumerate(axis.values)
            ]
            return hp.choice(path, options)
        case FloatDomain() if drawn.is_log:
            return hp.loguniform(path, math.log(drawn.low), math.log(drawn.high))
        case FloatDomain():
            return hp.uniform(path, drawn.low, drawn.high)
        case IntDomain() if drawn.is_log:
            # Rounded to whole numbers: each is as likely as the real numbers that are nearest to it.
            low, high = math.log(drawn.low - 0.499), math.log(drawn.high + 0.499)
            return scope.int(hp.qloguniform(path, low, high, 1))
        case IntDomain():
            return hp.uniformint(path, drawn.low, drawn.high)
        case _:
            assert_never(drawn)


def _exists_with(axis: Axis, value: Any) -> bool:
    return any(repr(value) == repr(one) for values in (axis.when or {}).values() for one in values)


def _flatten(suggested: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in suggested.items():
        if isinstance(value, dict):
            inner = {name: each for name, each in value.items() if name != _INDEX}
            found |= {path: value[_INDEX]} | _flatten(inner)
        else:
            found[path] = value
    return found
