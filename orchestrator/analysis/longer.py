"""Forecast what twice the steps would bring for the leader."""

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from orchestrator.analysis.outcomes import Z95, forecast_trials, widening
from orchestrator.analysis.sweep_data import SweepData
from orchestrator.record import TrialState
from orchestrator.spec.search import LOSS
from orchestrator.sweep.schedulers.forecast.law import Plan
from orchestrator.sweep.schedulers.forecast.posterior import forecast
from orchestrator.sweep.schedulers.forecast.verdicts import teaching_curves

WORTH: Final = 0.02
"""Relative gain in loss above which twice the steps count as a help."""
_RISEN: Final = 0.01
_WIDE: Final = 4.0
"""Ratio of the ends of an interval above which a forecast says too little."""


@dataclass(frozen=True)
class Longer:
    """The leader with twice the steps."""

    steps: int
    """Steps of the leader as it was trained."""
    loss: float
    """Its loss at the last evaluation."""
    lowest: float
    lowest_step: int
    forecast: float
    """Loss forecast with twice the steps, under the same schedule stretched to them."""
    low: float
    high: float
    """Bounds of the 95% interval of the forecast."""
    chance: float
    """Chance that twice the steps lower the loss by `WORTH` or more."""
    widened: float
    """Factor by which the interval was widened, because this sweep's own forecasts were off by more than they said."""

    @property
    def is_unsure(self) -> bool:
        """Whether the interval is too wide to say anything."""
        return self.high > _WIDE * self.low

    @property
    def has_risen(self) -> bool:
        """Whether the loss has risen after its lowest value: the leader overfits."""
        return self.lowest_step < self.steps and self.loss > self.lowest * (1 + _RISEN)


def find_longer(data: SweepData) -> Longer | str:
    """Return the forecast of the leader with twice the steps, or why there is none."""
    leader = data.leader
    if leader is None:
        return "no trial has finished"
    if leader.state != TrialState.COMPLETE:
        return f"the leader, {leader.trial_id}, was itself stopped early, at step {leader.step}"
    trials = forecast_trials(data)
    at = next((i for i, trial in enumerate(trials) if trial.name == leader.trial_id), None)
    if at is None:
        plan_needs = "its loss cannot be forecast: that needs 4 evaluations in a trial and a known schedule"
        return f"{plan_needs} ({len(data.evaluations(leader.trial_id, LOSS))} evaluations found)"
    trial = trials[at]
    if len(trial.losses) < trial.plan.num_evaluations:
        return "evaluations of the leader are missing"
    curves = [np.log(each.losses) for each in trials]
    plans = [each.plan for each in trials]
    plans[at] = twice(trial.plan)
    found = forecast(plans, curves, teaching_curves(trials, curves))
    factor = widening(trials, len(trial.losses) // 2)  # from half-way to the end, as from the end to twice the steps
    mean, sd = float(found.mean[at]), factor * float(found.sd()[at])
    last, lowest = math.log(float(trial.losses[-1])), int(trial.losses.argmin())
    margin = last + math.log(1 - WORTH) - mean
    return Longer(
        steps=trial.step,
        loss=float(trial.losses[-1]),
        lowest=float(trial.losses[lowest]),
        lowest_step=int(trial.plan.steps[lowest]),
        forecast=math.exp(mean),
        low=math.exp(mean - Z95 * sd),
        high=math.exp(mean + Z95 * sd),
        chance=0.5 * math.erfc(-margin / math.sqrt(2) / max(sd, 1e-9)),
        widened=factor,
    )


def twice(plan: Plan) -> Plan:
    """Return a plan with one more evaluation, which has twice the steps and twice the summed rate of its last one.

    A run of twice the steps under the same schedule ends there: with the same last rate, and with each rate for twice
    as many steps.
    """
    return replace(
        plan,
        steps=np.append(plan.steps, 2 * plan.steps[-1]),
        rates=np.append(plan.rates, plan.rates[-1]),
        summed=np.append(plan.summed, 2 * plan.summed[-1]),
    )
