"""The value that each trial has at its end, or is forecast to have: trials that were stopped early count too."""

import math
from dataclasses import dataclass

import numpy as np

from orchestrator.analysis.sweep_data import LOSS, SweepData, value_of
from orchestrator.record import TrialResult, TrialState
from orchestrator.sweep.schedulers.forecast.plans import plan_trial
from orchestrator.sweep.schedulers.forecast.posterior import forecast
from orchestrator.sweep.schedulers.forecast.verdicts import Trial, teaching_curves


@dataclass(frozen=True)
class Outcome:
    """The best value that a trial has at its end."""

    trial: TrialResult
    value: float
    """Value of the search metric: measured, or forecast for a trial that has not made all its steps."""
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
    known, num_short = [], 0
    for trial in data.trials:
        value = value_of(trial)
        if value is None or trial.state == TrialState.FAILED:
            continue
        if trial.trial_id in forecasts and trial.state != TrialState.COMPLETE:
            mean, sd = forecasts[trial.trial_id]
            is_lower = mean < math.log(value)
            known.append(Outcome(trial, min(math.exp(mean), value), sd if is_lower else 0.0, is_forecast=is_lower))
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
    pairs = zip(trials, found.mean, found.sd(), strict=True)
    return {trial.name: (float(mean), float(sd)) for trial, mean, sd in pairs}
