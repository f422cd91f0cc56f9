"""How likely a scheduler stops a trial, by how much of its steps the trial has made."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.record import OPEN, TrialResult, TrialState
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import (
    AshaScheduler,
    BohbScheduler,
    ForecastScheduler,
    HyperBandScheduler,
    MedianScheduler,
)

_PLACES = 12
"""Most places of a trial, evenly apart, at which a rule without rungs may stop it."""
_FIRST, _LATER = 0.4, 0.5
"""Chance of a stop by a rule without rungs, before anything is known of the sweep: at the first place, and at all later
ones together. So a third of the trials make all their steps."""
_PRIOR_TRIALS = 2.0
"""Number of trials that the expectation before the sweep counts for at each place."""


@dataclass(frozen=True)
class Place:
    """A place at which trials may be stopped, with what has been seen there."""

    share: float
    """Share of a trial's steps."""
    chance: float
    """Chance of a stop as expected before the sweep."""
    num_stopped: int = 0
    num_passed: int = 0


@dataclass(frozen=True)
class Survival:
    """One possible rule: the share of trials that get past each place."""

    shares: list[float]
    """Places, as shares of a trial's steps, ascending."""
    left: list[float]
    """Share of all trials that pass the place."""

    def steps_left(self, step: int, total: int, rng: random.Random) -> int:
        """Draw how many more steps a trial makes that has made `step` of `total` steps."""
        done = step / total if total else 1.0
        passed = 1.0
        for share, left in zip(self.shares, self.left, strict=True):
            if share <= done:
                passed = left
        drawn = rng.random() * passed
        for share, left in zip(self.shares, self.left, strict=True):
            if share > done and drawn > left:
                return max(round(share * total) - step, 0)
        return max(total - step, 0)


class StopChances:
    """The places at which a sweep's scheduler may stop trials."""

    def __init__(self, spec: SweepSpec) -> None:
        """
        Args:
            spec: the experiment, whose scheduler and evaluation interval decide.
        """
        self._spec = spec

    def seen(self, trials: Sequence[TrialResult], is_late: bool) -> list[Place]:
        """Return the places, with the trials that ended or passed there so far.

        Args:
            trials: the trials to count.
            is_late: whether the trials began when others were half done. They are compared with better ones, so that
                more of them stop at the first place.
        """
        whole = max((trial.total_steps or 0 for trial in trials), default=0) or self._spec.training.steps or 0
        found = []
        places = self._expected(whole)
        for index, (share, chance) in enumerate(places):
            chance = (1 + chance) / 2 if is_late and not index else chance
            until = places[index + 1][0] if index + 1 < len(places) else 1.0
            stopped = passed = 0
            for trial in trials:
                done = trial.step / (trial.total_steps or whole or 1)
                ended_early = trial.state not in OPEN and trial.state != TrialState.COMPLETE
                if ended_early and share <= done < until:
                    stopped += 1
                elif done >= until or (trial.state == TrialState.COMPLETE) or done > share:
                    passed += 1
            found.append(Place(share, chance, stopped, passed))
        return found

    def _expected(self, whole: int) -> list[tuple[float, float]]:
        """Return the places and the chance of a stop at each, before anything is known of the sweep."""
        scheduler, interval = self._spec.scheduler, self._spec.training.eval_steps
        if not whole:
            return []
        if isinstance(scheduler, AshaScheduler | HyperBandScheduler | BohbScheduler):
            rung, factor = float(scheduler.grace_steps or interval), scheduler.reduction_factor
            places: list[tuple[float, float]] = []
            while rung < whole and len(places) < _PLACES:
                places.append((rung / whole, 1 - 1 / factor))
                rung *= factor
            return places
        if isinstance(scheduler, MedianScheduler | ForecastScheduler):
            grace = scheduler.grace_steps if isinstance(scheduler, MedianScheduler) else None
            first = (grace or 2 * interval) / whole
            apart = max(interval / whole, (1 - first) / _PLACES) if first < 1 else 1.0
            number = max(int((1 - first) / apart + 0.999), 0)
            later = 1 - (1 - _LATER) ** (1 / max(number - 1, 1))
            return [(first + index * apart, later if index else _FIRST) for index in range(number)]
        return []


def draw_survival(places: Sequence[Place], rng: random.Random) -> Survival:
    """Draw one rule that is compatible with what has been seen."""
    shares, left, passing = [], [], 1.0
    for place in places:
        alpha = _PRIOR_TRIALS * place.chance + place.num_stopped
        beta = _PRIOR_TRIALS * (1 - place.chance) + place.num_passed
        passing *= 1 - rng.betavariate(alpha, beta)
        shares.append(place.share)
        left.append(passing)
    return Survival(shares, left)
