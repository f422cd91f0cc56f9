"""Grid search and random search."""

import copy
import itertools
from collections.abc import Callable
from typing import Any, assert_never

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import BasicVariantGenerator

from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain, IntDomain
from orchestrator.spec.search import SearchSection
from orchestrator.sweep.search.drawn_points import DrawnPoints
from orchestrator.sweep.search.ending import Ends
from orchestrator.sweep.search.space import Point
from orchestrator.sweep.search.unfit import MAX_DROPPED, Dropped, nothing_fits
from orchestrator.sweep.tune_trial import plain_values


def tune_space(search: SearchSection) -> dict[str, Any]:
    """Return field -> Tune domain, for random search, where Tune draws; other algorithms hold their own space."""
    if search.algorithm != "random":
        return {}
    return {path: _domain(axis) for path, axis in search.space.items()}


class GridRandom(BasicVariantGenerator):  # type: ignore[misc]  # mypy skips ray
    """Tries the points of `search.first`, then draws at random or takes the next point of the grid.

    The points are put into Tune's trials here: Tune's own `points_to_evaluate` accepts no lists as values, and its
    grid knows no fields that exist only with others. After a resume the limit is that of the current workers.
    """

    def __init__(self, search: SearchSection, max_concurrent: int) -> None:
        """
        Args:
            search: the section of the experiment.
            max_concurrent: number of trials at a time; 0 for no limit.
        """
        super().__init__(random_state=search.seed, max_concurrent=max_concurrent)
        self.is_over = False
        """Whether a restored search draws no further trial."""
        self.ends: Ends | None = None
        """Says whether the search is over, whenever a trial has ended; None if it never ends before its last trial."""
        self.hold_open = False
        """Whether requests wait that may add trials, so that Tune must not end."""
        self.unfit_reason: Callable[[Point], str | None] | None = None
        """Returns why a point cannot fit into memory; None where no point is dropped for that."""
        self._dropped: list[Dropped] = []
        self._num_dropped, self._last_reason = 0, ""
        self._running: dict[str, Point] = {}
        """Trials that were drawn and have not ended, with their points."""
        self._ended: list[str] = []
        """Trials that have ended, in that order."""
        self._search = search
        self._drawn = DrawnPoints(search)
        self._points = list(search.points()) if search.algorithm == "grid" else copy.deepcopy(search.first)

    def is_finished(self) -> bool:
        """Return whether Tune may end its trainables once no more trials come.

        Trials that take turns still need them.
        """
        return bool(self._finished) and not (self._live_trials and self.max_concurrent == 0) and not self.hold_open

    def take_in(self, trial_id: str, point: Point | None) -> None:
        """Take in a trial that somebody has asked for.

        Args:
            trial_id: the trial.
            point: its point; None if that is outside the search space.
        """
        self._live_trials.add(trial_id)
        if point is not None:
            self._running[trial_id] = dict(point)
            if self._search.algorithm != "grid":  # a grid tries each of its points
                self._drawn.see(point)

    def set_aside(self, trial_id: str) -> None:
        """Let another trial have the slot of one that is paused by request."""
        self._live_trials.discard(trial_id)

    def take_back(self, trial_id: str) -> None:
        """Keep a slot for a trial that continues."""
        self._live_trials.add(trial_id)

    def forget(self, trial_id: str) -> None:
        """Do nothing: no result changes what is drawn here."""

    def extend(self, search: SearchSection) -> None:
        """Go on with another number of trials."""
        more = search.total_trials - self._search.total_trials
        self._search = search
        if more > 0:
            self._total_samples += more
            for iterator in self._iterators:
                iterator.num_samples_left += more
            self._finished, self._trial_iter = False, None
            self._trial_generator = itertools.chain(*self._iterators)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take over the end of a trial; it may be that of the search."""
        super().on_trial_complete(trial_id, result, error)
        self._running.pop(trial_id, None)
        self._ended.append(trial_id)
        are_left = not self._finished and len(self._ended) + len(self._running) < self._search.total_trials
        if are_left and self.ends is not None and self.ends(self._ended, self._running.values(), error):
            self.set_finished()

    def next_trial(self) -> Any:
        """Return the next trial, at a point that no other trial has; None where there is none at the moment."""
        trial = None if self._finished else super().next_trial()
        if trial is not None:
            point = self._next_point([self._search.decode(plain_values(trial.config))])
            if point is None:
                self._live_trials.discard(trial.trial_id)
                self.set_finished()
                return None
            trial.set_config(point)
            trial.evaluated_params = dict(trial.config)
            self._running[trial.trial_id] = plain_values(trial.config)
        return trial

    def take_dropped(self) -> list[Dropped]:
        """Return the points that were dropped since the last call."""
        taken, self._dropped = self._dropped, []
        return taken

    def _next_point(self, from_tune: list[Point]) -> Point | None:
        """Return a point that no other trial has and that fits into memory; None where no such point is left.

        Args:
            from_tune: the point that Tune has drawn, if it is to be used.

        Raises:
            SweepError: many points in a row, or all points, cannot fit.
        """
        for _ in range(MAX_DROPPED):
            num_drawn = len(self._running) + len(self._ended) + self._num_dropped
            if self._num_dropped and num_drawn >= self._search.num_points:
                if not self._running and not self._ended:
                    raise nothing_fits(self._num_dropped, self._last_reason)
                return None
            point = self._drawn.draw_new(
                lambda: self._points.pop(0) if self._points else from_tune.pop() if from_tune else self._draw(),
                lambda: None,
                lambda chosen: self._points.insert(0, chosen),
            )
            assert point is not None
            reason = None if self.unfit_reason is None else self.unfit_reason(plain_values(point))
            if reason is None:
                return point
            self._num_dropped, self._last_reason = self._num_dropped + 1, reason
            self._dropped.append(Dropped(Trial.generate_id(), reason))
        raise nothing_fits(self._num_dropped, self._last_reason)

    def _draw(self) -> Point:
        space = self._search.space
        drawn = {path: _domain(axis).sample(random_state=self._random_state) for path, axis in space.items()}
        return self._search.decode(plain_values(drawn))

    def get_state(self) -> Any:
        """Return the state that a resume needs, as Tune saves it: without the rules, which belong to the driver."""
        state = super().get_state()
        return state and {name: value for name, value in state.items() if name not in _OF_THE_DRIVER}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state of `get_state`, with the current limit and number of trials."""
        current = {
            "max_concurrent": self.max_concurrent,
            "_search": self._search,
            "is_over": self.is_over,
            "ends": self.ends,
            "unfit_reason": self.unfit_reason,
            "hold_open": self.hold_open,
            "_finished": self.is_over,
            "_total_samples": self._search.total_trials,
        }
        before = {"_running": {}, "_ended": [], "_dropped": [], "_num_dropped": 0, "_last_reason": ""}
        super().set_state(before | state | current)
        for iterator in self._iterators:
            iterator.num_samples_left += self._search.total_trials - state["_total_samples"]


_OF_THE_DRIVER = ("ends", "unfit_reason", "_dropped")
"""Attributes that are not saved."""


def _domain(axis: Axis) -> Any:
    match drawn := axis.domain():
        case IndexDomain():
            return tune.choice([*range(drawn.count)])
        case FloatDomain():
            return (tune.loguniform if drawn.is_log else tune.uniform)(drawn.low, drawn.high)
        case IntDomain():
            return (tune.lograndint if drawn.is_log else tune.randint)(drawn.low, drawn.high + 1)
        case _:
            assert_never(drawn)
