"""HyperOpt's TPE in Ray Tune's terms (extra `hyperopt`)."""

import math
from typing import Any

from hyperopt import hp
from hyperopt.fmin import generate_trial
from hyperopt.pyll import scope
from ray.tune.search.hyperopt import HyperOptSearch

from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.search.algorithms import by_depth, encode
from orchestrator.sweep.search.drawn_points import DrawnPoints, Point
from orchestrator.sweep.tune_trial import plain_values

_POINT, _PLACE = "point", "place"


def make_hyperopt(search: SearchSection) -> "HyperOpt":
    """The searcher, seeded."""
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
    """Suggests points of the space: of fields that exist only with others, those that do."""

    def __init__(self, search: SearchSection, **settings: Any) -> None:
        """`settings` are those of Tune's."""
        super().__init__(**settings)
        self._search = search
        self._drawn = DrawnPoints(search)
        self._is_placed = False
        """Whether the next draw is a point that was chosen here, behind those to try first."""
        for given in self._hpopt_trials.trials:
            self._complete(given)

    def suggest(self, trial_id: str) -> Point | None:
        """A new point for a trial. hyperopt leaves a draw that is discarded out, as it does a failed trial."""
        return self._drawn.draw_new(
            lambda: self._draw(trial_id), lambda: self.on_trial_complete(trial_id, error=True), self._place
        )

    def _draw(self, trial_id: str) -> Point:
        suggested = super().suggest(trial_id)
        if self._is_placed:
            self._points_to_evaluate, self._is_placed = 0, False
        return self._search.decode(plain_values(_flat(suggested[_POINT])))

    def _place(self, point: Point) -> None:
        """Add a point in the way in which Tune adds points to try first. All of those were drawn before."""
        (number,) = self._hpopt_trials.new_trial_ids(1)
        given = generate_trial(number, encode(self._search, point))
        self._complete(given)
        self._hpopt_trials.insert_trial_doc(given)
        self._hpopt_trials.refresh()
        self._points_to_evaluate, self._is_placed = len(self._hpopt_trials.trials), True

    def _complete(self, given: dict[str, Any]) -> None:
        """Add the fields that do not exist at a given point: they were drawn no times."""
        for drawn in (given["misc"]["idxs"], given["misc"]["vals"]):
            for path in self._search.space:
                drawn.setdefault(path, [])


def _space(search: SearchSection) -> dict[str, Any]:
    """Field -> hyperopt's node. A listed value brings the fields along that exist with it; these share their nodes."""
    nodes: dict[str, Any] = {}
    for path in reversed(by_depth(search)):
        axis = search.space[path]
        if not isinstance(axis.domain(), IndexDomain):
            nodes[path] = _node(path, axis)
            continue
        children = [child for child, other in search.space.items() if other.parent == path]
        nodes[path] = hp.choice(
            path,
            [
                {_PLACE: place}
                | {child: nodes[child] for child in children if _exists_with(search.space[child], value)}
                for place, value in enumerate(axis.values)
            ],
        )
    return {path: nodes[path] for path, axis in search.space.items() if axis.parent is None}


def _exists_with(axis: Axis, value: Any) -> bool:
    return any(repr(value) == repr(one) for values in (axis.when or {}).values() for one in values)


def _node(path: str, axis: Axis) -> Any:
    drawn = axis.domain()
    assert not isinstance(drawn, IndexDomain)
    low, high = drawn.low, drawn.high
    if isinstance(drawn, FloatDomain):
        return hp.loguniform(path, math.log(low), math.log(high)) if drawn.is_log else hp.uniform(path, low, high)
    if not drawn.is_log:
        return hp.uniformint(path, low, high)
    # Rounded to whole numbers: each of them is as likely as the numbers nearest to it.
    return scope.int(hp.qloguniform(path, math.log(low - 0.499), math.log(high + 0.499), 1))


def _flat(suggested: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in suggested.items():
        if isinstance(value, dict):
            found |= {path: value[_PLACE]} | _flat({name: inner for name, inner in value.items() if name != _PLACE})
        else:
            found[path] = value
    return found
