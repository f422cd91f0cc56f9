"""What is known of a trial before it starts, from its configuration."""

from typing import Final

import numpy as np

from orchestrator.spec import SweepSpec
from orchestrator.spec.search import LOSS
from orchestrator.spec.sections import TrialConfig
from orchestrator.sweep.schedulers.forecast.law import Plan
from orchestrator.sweep.schedulers.forecast.rates import learning_rates
from orchestrator.sweep.schedulers.forecast.verdicts import MIN_PLANNED

MAX_EVALUATIONS: Final = 50
"""Evaluations of a trial that the forecast uses, evenly spaced: its time grows with their cube."""


def why_median(spec: SweepSpec, num_rows: int) -> str | None:
    """Return why trials of a sweep fall to the median rule; None if all of them can be forecast.

    Args:
        spec: the experiment.
        num_rows: training rows, or packed sequences.
    """
    if spec.search.metric != LOSS:
        return f"only {LOSS} can be forecast"
    plans = (plan_trial(config, num_rows) for config in spec.corners())
    return next((plan for plan in plans if isinstance(plan, str)), None)


def plan_trial(config: TrialConfig, num_rows: int) -> Plan | str:
    """Return a trial's plan, or why its loss cannot be forecast.

    Args:
        config: the trial's configuration.
        num_rows: training rows, or packed sequences.
    """
    training = config.training
    total = training.steps_of(num_rows)
    steps = [*range(training.eval_steps, total, training.eval_steps), total]
    if len(steps) < MIN_PLANNED:
        return f"a forecast needs {MIN_PLANNED} evaluations in a trial, and this one has {len(steps)}"
    try:
        rates = learning_rates(training, total)
    except KeyError:
        return f"the rates of schedule {training.schedule} are not known beforehand"
    every = -(-len(steps) // MAX_EVALUATIONS)
    at = np.array(steps)[::-1][::every][::-1]
    return Plan(
        steps=at.astype(np.float64),
        rates=rates[at - 1],
        summed=np.cumsum(rates)[at - 1],
        peak=training.learning_rate,
        rank=config.lora.rank,
        rows=training.batch_size * training.accumulation,
    )
