"""The value that each trial has at its end, or is forecast to have: trials that were stopped early count too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from orchestrator.analysis.sweep_data import SweepData, value_of
from orchestrator.record import TrialResult, TrialState
from orchestrator.record.sweep_record import CHOOSABLE
from orchestrator.spec.search import LOSS
from orchestrator.sweep.schedulers.forecast.plans import plan_trial
from orchestrator.sweep.schedulers.forecast.posterior import forecast
from orchestrator.sweep.schedulers.forecast.verdicts import Trial, teaching_curves

MIN_CHECKED: Final = 5
"""Forecasts with a known outcome that are needed to say how far forecasts are off."""
Z95: Final = 1.96
"""Half of a 95% interval, in standard deviations."""


@dataclass(frozen=True)
class Outcome:
    """The best value that a trial has at its end."""

    trial: TrialResult
    value: float
    """Value of the search metric: measured, or forecast for a trial that has not made all its steps. A forecast is
    never better than the best value that was measured, nor worse than the trial's own."""
    log_sd: float = 0.0
    """Standard deviation of the logarithm of a forecast value; 0 of a measured one."""
    is_forecast: bool = False


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of all trials that have a value."""

    known: list[Outcome]
    diverged: list[TrialResult]
    """Trials that failed because a loss or a gradient was not finite; worse than all others."""
    num_short: int
    """Trials that were stopped early and count with their best value so far, because they cannot be forecast."""


def find_outcomes(data: SweepData) -> Outcomes:
    """Return the outcome of each trial that has a value."""
    forecasts = _forecasts(data) if data.metric == LOSS else {}
    measured = [v for trial in data.trials if trial.state in CHOOSABLE and (v := value_of(trial)) is not None]
    best, known, num_short = min(measured, default=0.0), list[Outcome](), 0
    for trial in data.trials:
        value = value_of(trial)
        if value is None or trial.state == TrialState.FAILED:
            continue
        if trial.trial_id in forecasts and trial.state != TrialState.COMPLETE and value > 0:
            mean, sd = forecasts[trial.trial_id]
            is_lower = mean < math.log(value)
            outcome = min(max(math.exp(mean), best), value)
            if 0 < best <= value:  # no number between two bounds deviates by more than half of their distance
                sd = min(sd, math.log(value / best) / 2)
            known.append(Outcome(trial, outcome, sd if is_lower else 0.0, is_forecast=is_lower))
        else:
            num_short += trial.state != TrialState.COMPLETE
            known.append(Outcome(trial, value))
    diverged = [trial for trial in data.trials if trial.state == TrialState.FAILED and trial.failure == "diverged"]
    return Outcomes(known, diverged, num_short)


def forecast_trials(data: SweepData) -> list[Trial]:
    """Return the trials whose loss can be forecast, with their curves at the planned evaluations."""
    found = []
    for trial in data.trials:
        plan = plan_trial(trial.config, data.info.num_rows)
        if isinstance(plan, str) or trial.parent is not None:
            continue
        losses = {point.step: point.values[LOSS] for point in data.evaluations(trial.trial_id, LOSS)}
        curve: list[float] = []
        for step in plan.steps:
            if losses.get(int(step), 0.0) <= 0:
                break
            curve.append(losses[int(step)])
        if curve:
            found.append(Trial(trial.trial_id, plan, np.array(curve), trial.state == TrialState.RUNNING))
    return found


def _forecasts(data: SweepData) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of the last log loss, by trial."""
    trials = forecast_trials(data)
    if len(trials) < 2:
        return {}
    curves = [np.log(trial.losses) for trial in trials]
    found = forecast([trial.plan for trial in trials], curves, teaching_curves(trials, curves))
    factors = {seen: widening(trials, seen) for seen in {len(trial.losses) for trial in trials}}
    return {
        trial.name: (float(mean), factors[len(trial.losses)] * float(sd))
        for trial, mean, sd in zip(trials, found.mean, found.sd(), strict=True)
    }


def widening(trials: Sequence[Trial], seen: int) -> float:
    """Return the factor by which intervals of forecasts must be widened for 95% of this sweep's own to hold.

    Each trial that ran to its end is forecast from its first `seen` evaluations, and the error is compared with the
    forecast's standard deviation (split conformal prediction; Vovk et al., Algorithmic Learning in a Random World,
    2005). With fewer than `MIN_CHECKED` of them the factor is 1.
    """
    curves = [np.log(trial.losses[:seen]) for trial in trials]
    found = forecast([trial.plan for trial in trials], curves, teaching_curves(list(trials), curves))
    errors = [
        abs(math.log(trial.losses[-1]) - float(mean)) / float(sd)
        for trial, mean, sd in zip(trials, found.mean, found.sd(), strict=True)
        if len(trial.losses) == trial.plan.num_evaluations > seen
    ]
    if len(errors) < MIN_CHECKED:
        return 1.0
    return max(float(np.quantile(errors, 0.95)) / Z95, 1.0)
