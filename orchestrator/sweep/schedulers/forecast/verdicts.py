"""Decide which of the trials that report now stop, and say why.

A trial stops when its chance to end below the yardstick falls under a stated level. The yardstick is the leader, the
trial whose outcome is forecast lowest. Until it has done three quarters of its steps, the trial after it is the
yardstick: the lowest of many uncertain forecasts is too low on average, and the field must not be judged by it. A trial
at a high rate is neither while its loss is above where the sweep began.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.sweep.schedulers.forecast.law import Plan, geometric_mean
from orchestrator.sweep.schedulers.forecast.posterior import Forecast, forecast

MIN_SEEN: Final = 2
"""Evaluations of a trial before it may be stopped. After one, the intervals are too narrow."""
MIN_PLANNED: Final = 4
"""Evaluations that a trial must have in all for a forecast."""
DIVERGED: Final = 0.15
"""A trial has diverged if its log loss exceeds that of the sweep's first evaluations (median) by this much."""
RISEN: Final = 0.15
"""A curve that has risen by this much log loss above its lowest point teaches the other trials nothing."""
SURE: Final = 0.75
"""Share of the leader's steps after which it is the yardstick. Before, the second best is."""
PLATEAU: Final = 0.01
"""A trial is on a plateau if less log loss than this is forecast to go."""
OVERFIT: Final = 0.01
"""A trial overfits if its last log loss is this much above its lowest, at no higher rate."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A trial with at least one evaluation."""

    name: str
    plan: Plan
    losses: NDArray[np.float64]
    """Held-out losses, one for each evaluation so far; all finite and positive."""
    is_running: bool = True
    """Whether more evaluations can come. The outcome of another trial is its lowest loss."""

    @property
    def step(self) -> int:
        """Step of its last evaluation."""
        return int(self.plan.steps[len(self.losses) - 1])

    @property
    def is_sure(self) -> bool:
        """Whether so many of its steps are done that it may be the yardstick."""
        return bool(self.step >= SURE * self.plan.steps[-1])


def default_chance(num_trials: int) -> float:
    """Return the chance of beating the leader below which a trial of a sweep of this size is stopped."""
    return min(0.16, 2.1 / num_trials)


def forecast_trials(trials: list[Trial]) -> Forecast:
    """Return the forecast of trials, at least one, from their losses so far."""
    curves = [np.log(trial.losses) for trial in trials]
    return forecast([trial.plan for trial in trials], curves, teaching_curves(trials, curves))


def verdicts(trials: list[Trial], reporting: set[str], chance: float, found: Forecast | None = None) -> dict[str, str]:
    """Decide about the trials that report now, together.

    Args:
        trials: all trials of the sweep with an evaluation, ended ones included.
        reporting: names of the trials that report now and could go on.
        chance: a trial stops if its chance to end below the yardstick is less.
        found: the forecast of the trials, if it is known.

    Returns:
        Why a trial stops, by its name; trials that go on are left out.
    """
    ready = [trial for trial in trials if trial.name in reporting and len(trial.losses) >= MIN_SEEN]
    if len(trials) < 2 or not ready:
        return {}
    field = _Field(trials, found or forecast_trials(trials))
    return {each.name: field.sentence(each, p) for each in ready if (p := field.chance(each)) < chance}


def outcomes(trials: list[Trial], found: Forecast | None = None) -> dict[str, float]:
    """Return the loss with which each trial ends, by name: its forecast, or its lowest loss so far if that is lower.

    A stopped trial is forecast like one that runs. Early forecasts are often too low, so ask again as others go on.

    Args:
        trials: all trials of the sweep with an evaluation, ended ones included.
        found: the forecast of the trials, if it is known.
    """
    mean = (found or forecast_trials(trials)).mean
    return {trial.name: math.exp(min(float(mean[i]), math.log(trial.losses.min()))) for i, trial in enumerate(trials)}


class _Field:
    """The trials of a sweep at one moment, with their forecasts."""

    def __init__(self, trials: list[Trial], found: Forecast) -> None:
        curves = [np.log(trial.losses) for trial in trials]
        self._index = {trial.name: i for i, trial in enumerate(trials)}
        self._lowest = np.array([curve.min() for curve in curves])
        self._mean_rate = geometric_mean([trial.plan.peak for trial in trials])
        self._diverged = _stands_above_start(trials, curves, DIVERGED)
        self.forecast = found
        is_running = np.array([trial.is_running for trial in trials])
        outcome = np.where(is_running, np.minimum(self.forecast.mean, self._lowest), self._lowest)
        order = np.lexsort((outcome, _stands_above_start(trials, curves, 0.0)))
        self._leader = trials[order[0]]
        is_sure = self._leader.is_sure or not self._leader.is_running
        self._yardstick = self._leader if is_sure else trials[order[1]]
        self._outcome = outcome
        self._median_first = float(np.exp(np.median([curve[0] for curve in curves])))

    def chance(self, trial: Trial) -> float:
        """Return the chance that a trial ends below the yardstick; 1 for the leader and the yardstick."""
        i, j = self._index[trial.name], self._index[self._yardstick.name]
        if trial in (self._leader, self._yardstick):
            return 1.0
        spread = self.forecast.covariance
        variance = spread[i, i]
        if self._outcome[j] == self.forecast.mean[j]:  # otherwise it has its outcome already
            variance = variance + spread[j, j] - 2 * spread[i, j]
        margin = self._outcome[j] - self.forecast.mean[i]
        return 0.5 * math.erfc(-margin / math.sqrt(2 * max(variance, 1e-12)))

    def sentence(self, trial: Trial, chance: float) -> str:
        """Say why a trial stops."""
        i, j = self._index[trial.name], self._index[self._yardstick.name]
        mean = math.exp(self.forecast.mean[i])
        half_width = mean * float(self.forecast.sd()[i])
        rank = (
            "the leader"
            if self._yardstick is self._leader
            else "the second best, as the leader has over a quarter to go"
        )
        return (
            f"{self._state(trial)}: forecast {mean:.3g} +- {half_width:.2g} at step {trial.plan.steps[-1]:.0f}; "
            f"{self._yardstick.name}, {rank}, is forecast {math.exp(self._outcome[j]):.3g}; "
            f"{chance:.1%} chance of beating it"
        )

    def _state(self, trial: Trial) -> str:
        """Say what is wrong with a trial: divergence, overfit, a rate that is yet to fall, a plateau, or slowness."""
        i, seen = self._index[trial.name], len(trial.losses)
        last, rates = trial.losses[-1], trial.plan.rates
        at = int(trial.losses.argmin())
        if self._diverged[i]:
            return (
                f"diverged, loss {last:.3g} at step {trial.step}, where the sweep's first evaluations "
                f"were {self._median_first:.3g}"
            )
        if math.log(last) - self._lowest[i] > OVERFIT and rates[seen - 1] <= rates[at]:
            lowest = f"{trial.losses[at]:.3g} at step {trial.plan.steps[at]:.0f}"
            return f"overfits, loss {last:.3g} at step {trial.step} after {lowest}"
        to_go = math.log(last) - self.forecast.mean[i]
        if trial.plan.peak > self._mean_rate and rates[-1] < 0.5 * rates[seen - 1] and to_go > PLATEAU:
            return f"loss {last:.3g} at step {trial.step}, {1 - math.exp(-to_go):.0%} to go once the rate has fallen"
        if to_go < PLATEAU:
            return f"on a plateau, loss {last:.3g} at step {trial.step}"
        return f"too slow, loss {last:.3g} at step {trial.step}"


def teaching_curves(trials: list[Trial], curves: list[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """Return which curves the sweep learns from, (n,): not those that have diverged or risen.

    Args:
        trials: n trials.
        curves: their log losses so far.
    """
    has_risen = np.array([curve[-1] - curve.min() for curve in curves]) > RISEN
    return ~(has_risen | _stands_above_start(trials, curves, DIVERGED))


def _stands_above_start(trials: list[Trial], curves: list[NDArray[np.float64]], margin: float) -> NDArray[np.bool_]:
    """Return which trials at a rate above the sweep's mean stand above where the sweep began, by a margin of log loss.

    Such a trial may have diverged. What its rate will still bring is an extrapolation, so it is no yardstick.
    """
    first = np.median([curve[0] for curve in curves])
    mean_rate = geometric_mean([trial.plan.peak for trial in trials])
    is_high = np.array([curve[-1] for curve in curves]) > first + margin
    is_fast = np.array([trial.plan.peak for trial in trials]) > mean_rate
    found: NDArray[np.bool_] = is_high & is_fast
    return found
