"""The default search: it begins where good values are believed to lie, then follows a model of what it has seen."""

import itertools
import math
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from orchestrator.record.models import PriorSweep
from orchestrator.spec.search import RATE, SearchSection
from orchestrator.sweep.search.coordinates import Coordinate
from orchestrator.sweep.search.drawn_points import DrawnPoints
from orchestrator.sweep.search.models import Forecast, propose
from orchestrator.sweep.search.prior_evidence import comparable, not_replaced
from orchestrator.sweep.search.space import Point

_RATE_FACTORS = (1.0, 3.0, 1 / 3)
"""The first trials differ in the learning rate only: these factors of the rate that is believed to be good."""
_UNIFORM_SHARE = 0.25
"""Share of the trials before the model that are drawn anywhere in the space, in case the belief is wrong."""
_CHANGE_SHARE = 0.5
"""Probability with which a draw around the best trial changes a field (PriorBand, arXiv 2306.12370, section 5)."""
_PRIOR_WEIGHT = 10.0
"""Weight of the belief beside a single result; it is divided by the number of results (arXiv 2204.11051)."""


@dataclass
class _Trial:
    """One trial that the search has suggested, or that somebody has asked for at a point of the space."""

    point: Point
    why: str
    best: float | None = None
    """Best result so far, where lower is better; infinite if the trial failed by its values. A stopped trial counts by
    the forecast of its end."""
    measured: float | None = None
    """Best evaluation so far, likewise."""
    has_ended: bool = False
    is_added: bool = False
    """Whether somebody has asked for the trial."""


class Auto(Searcher):  # type: ignore[misc]  # mypy skips ray
    """Suggests points of the space, each with the reason for it. No point is suggested twice.

    The order: the points of `search.first`; the prior, and other learning rates at it; draws around the prior until
    there are results; then proposals of a model. All draws depend on the seed, the number of the trial and the results
    so far, and the state is pickled with the sweep, so a resumed search continues as it would have.
    """

    def __init__(self, search: SearchSection, prior_sweeps: Sequence[PriorSweep] = ()) -> None:
        """Take the experiment's search section, with `search.prior` as `rate_prior.with_prior` has completed it.

        Args:
            search: the section.
            prior_sweeps: earlier sweeps. The search begins at the prior alone, and the model proposes from the first
                result on.
        """
        super().__init__(metric=search.metric, mode=search.resolved_mode)
        self._search = search
        self._prior_sweeps = prior_sweeps
        self._trials: dict[str, _Trial] = {}
        self._drawn = DrawnPoints(search)
        self._enqueued: list[Point] = []

    def suggest(self, trial_id: str) -> Point | None:
        """Return a new point for a trial."""
        chosen = _Trial({}, "")
        attempts = itertools.count()

        def draw() -> Point:
            chosen.point, chosen.why = self._choose(next(attempts))
            return chosen.point

        point = self._drawn.draw_new(draw, lambda: None, self._enqueued.append)
        self._trials[trial_id] = chosen
        return point

    def take_in(self, trial_id: str, point: Point) -> None:
        """Take in a trial that somebody has asked for: its results count as those of the search's own trials."""
        self._drawn.see(point)
        self._trials[trial_id] = _Trial(dict(point), "added by request", is_added=True)

    def forget(self, trial_id: str) -> None:
        """Drop the results of a trial that was stopped by request: they say nothing about its values."""
        self._trials[trial_id].best = None

    def why_chosen(self, trial_id: str) -> str | None:
        """Return the reason for a trial's values; None for a trial of another search."""
        return self._trials[trial_id].why if trial_id in self._trials else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take over a trial's evaluation: it counts by the best of all its evaluations."""
        self._take_over(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take over the end of a trial. A trial that was lost counts by the evaluations that it has had."""
        if result:
            self._take_over(trial_id, result)
        self._trials[trial_id].has_ended = True

    def count_as(self, trial_id: str, value: float) -> None:
        """Have a stopped trial count by the forecast of its end. Its best evaluation so far depends on how early it was
        stopped, and on how much its rate had yet to fall. The forecast is never worse than that evaluation."""
        self._trials[trial_id].best = value if self.mode == "min" else -value

    def _take_over(self, trial_id: str, result: dict[str, Any]) -> None:
        trial, value = self._trials[trial_id], float(result[self.metric])
        value = math.inf if math.isnan(value) else value if self.mode == "min" else -value
        # A failure is reported as the worst value, whatever came before it.
        trial.best = value if trial.best is None or math.isinf(value) else min(trial.best, value)
        trial.measured = value if trial.measured is None else min(trial.measured, value)

    def _choose(self, attempt: int) -> tuple[Point, str]:
        """Return a point and the reason for it.

        Args:
            attempt: number of points that were chosen for this trial before and were not new.
        """
        if self._enqueued:
            return self._enqueued.pop(), "drawn anywhere: the points that the search prefers have been tried"
        number = sum(not trial.is_added for trial in self._trials.values())
        generator = random.Random(f"{self._search.seed} {number} {attempt}")
        designed = self._designed()
        if number + attempt < len(designed):
            return designed[number + attempt]
        finished = [trial for trial in self._trials.values() if trial.has_ended and trial.best is not None]
        if len(finished) < self._num_startup:
            return self._draw_by_belief(generator)
        if attempt:
            return self._draw_around_best(finished, generator)
        return self._propose(finished, number)

    @property
    def _num_startup(self) -> int:
        return self._search.startup_trials or (1 if self._prior_sweeps else len(_RATE_FACTORS))

    def _designed(self) -> list[tuple[Point, str]]:
        """Return the points that do not depend on results."""
        prior = prior_point(self._search)
        designed = [(point, "one of search.first") for point in self._search.first]
        if RATE not in prior:
            return [*designed, (prior, _prior_phrase("begins at", prior))]
        coordinate = Coordinate.of(self._search.space[RATE])
        for factor in _RATE_FACTORS[:1] if self._prior_sweeps else _RATE_FACTORS:
            point = prior | {RATE: coordinate.nearest(factor * prior[RATE])}
            how = "begins at" if factor == 1 else f"{factor:.2g} times the rate of"
            phrase = _prior_phrase(how, prior)
            if all(point != other for other, _ in designed):
                designed.append((point, phrase))
        return designed

    def _draw_by_belief(self, generator: random.Random) -> tuple[Point, str]:
        if generator.random() < _UNIFORM_SHARE:
            drawn = {path: each.draw(generator) for path, each in self._coordinates().items()}
            return self._search.active(drawn), "drawn anywhere in the space, in case the prior is wrong"
        center = _everywhere(self._search)
        drawn = {path: each.draw_around(center[path], generator) for path, each in self._coordinates().items()}
        return self._search.active(drawn), _prior_phrase("drawn around", prior_point(self._search))

    def _draw_around_best(self, finished: list[_Trial], generator: random.Random) -> tuple[Point, str]:
        best = min(finished, key=lambda trial: trial.best or 0.0)
        center = _everywhere(self._search) | best.point
        drawn = {
            path: each.draw_around(center[path], generator) if generator.random() < _CHANGE_SHARE else center[path]
            for path, each in self._coordinates().items()
        }
        how = "" if best.best == best.measured else "forecast to end with "
        return self._search.active(drawn), f"drawn around the best trial so far ({how}{self._value_phrase(best.best)})"

    def _propose(self, finished: list[_Trial], number: int) -> tuple[Point, str]:
        coordinates = self._coordinates()

        def drawn(point: Point) -> Point:
            return {path: coordinates[path].encode(value) for path, value in point.items()}

        proposal = propose(
            {path: each.distribution() for path, each in coordinates.items()},
            [(drawn(trial.point), trial.best or 0.0) for trial in finished]
            + [(drawn(point), value) for point, value in self._prior_results(finished)],
            [drawn(trial.point) for trial in self._trials.values() if not trial.has_ended],
            prior=drawn(_everywhere(self._search)),
            prior_weight=_PRIOR_WEIGHT / len(finished),
            has_conditions=any(axis.when for axis in self._search.space.values()),
            seed=random.Random(f"{self._search.seed} {number}").randrange(2**31),
        )
        point = self._search.active({path: coordinates[path].decode(value) for path, value in proposal.drawn.items()})
        return point, self._proposal_phrase(proposal.sampler, proposal.forecast, finished)

    def _prior_results(self, finished: list[_Trial]) -> list[tuple[Point, float]]:
        best = min(trial.best or 0.0 for trial in finished)
        earlier = comparable(self._prior_sweeps, self._search.resolved_mode, best)
        return not_replaced(earlier, [trial.point for trial in finished], self._coordinates())

    def _proposal_phrase(self, sampler: str, forecast: Forecast | None, finished: list[_Trial]) -> str:
        best = min((trial.measured for trial in finished if trial.measured is not None), default=None)
        model = f"{sampler} on {len(finished)} results"
        if self._prior_sweeps:
            model += f" and {len(self._prior_results(finished))} of earlier sweeps"
        if forecast is None:
            return f"{model}; the best is {self._value_phrase(best)}"
        return (
            f"{model} expects {self._value_phrase(forecast.mean)} +- {forecast.spread:.2g}, "
            f"a gain of {forecast.gain:.2g}; the best is {self._value_phrase(best)}"
        )

    def _value_phrase(self, value: float | None) -> str:
        return "no value" if value is None else f"{self.metric} {value if self.mode == 'min' else -value:.4g}"

    def _coordinates(self) -> dict[str, Coordinate]:
        return {path: Coordinate.of(axis) for path, axis in self._search.space.items()}

    def save(self, checkpoint_path: str) -> None:
        """Save the state. Tune calls this after each event."""
        Path(checkpoint_path).write_bytes(pickle.dumps((self._trials, self._drawn, self._enqueued)))

    def restore(self, checkpoint_path: str) -> None:
        """Restore a state of `save`."""
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        self._trials, self._drawn, self._enqueued = state


def prior_point(search: SearchSection) -> Point:
    """Return the point around which good ones are believed to lie: `search.prior`, else the middle of each axis."""
    return search.active(_everywhere(search))


def _everywhere(search: SearchSection) -> Point:
    """Return the prior with a value for every axis, also for those that do not exist there."""
    coordinates = {path: Coordinate.of(axis) for path, axis in search.space.items()}
    return {path: search.written_prior.get(path, each.middle()) for path, each in coordinates.items()}


def _prior_phrase(how: str, prior: Point) -> str:
    values = ", ".join(
        f"{path} {value:.3g}" if isinstance(value, float) else f"{path} {value}" for path, value in prior.items()
    )
    return f"{how} the prior ({values})"
