"""Simulated learning curves that follow the annealing law, with noise."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.spec.sections import TrainingSection
from orchestrator.sweep.schedulers.forecast.law import Plan
from orchestrator.sweep.schedulers.forecast.rates import learning_rates

STEPS, EVERY = 400, 20


def plan(
    rate: float, schedule: str = "cosine", rank: int = 16, rows: int = 8, every: int = EVERY, **training: Any
) -> Plan:
    """Return the plan of a trial."""
    section = TrainingSection(steps=STEPS, learning_rate=rate, schedule=schedule, batch_size=rows, **training)  # type: ignore[arg-type]
    rates = learning_rates(section, STEPS)
    at = np.arange(every, STEPS + 1, every)
    return Plan(at.astype(float), rates[at - 1], np.cumsum(rates)[at - 1], rate, rank, rows)


def losses(plan: Plan, draw: np.random.Generator, noise: float = 0.002, scale: float = 1.0) -> NDArray[np.float64]:
    """Return a trial's losses: a power law of the summed rate, plus a cost in proportion to the present rate.

    `noise` is the standard deviation of an evaluation, in units of log loss.
    """
    learning = 0.25 * (plan.summed / 0.01) ** -0.35
    cost = 0.04 * plan.rates / 5e-4
    best_rate = 0.03 * np.log2(plan.peak / 1e-3) ** 2
    gaps = np.diff(np.log(plan.steps), prepend=np.log(plan.steps[0] / 2))
    drift = np.cumsum(draw.normal(0, 0.015, len(gaps)) * np.sqrt(gaps))
    logs: NDArray[np.float64] = (
        -0.6 + 0.3 * best_rate + learning + cost + drift + draw.normal(0, noise, len(gaps)) + draw.normal(0, 0.02)
    )
    return scale * np.exp(logs)


def sweep(num: int, seed: int, **options: Any) -> tuple[list[Plan], list[NDArray[np.float64]]]:
    """Return the plans of random trials, and their whole curves."""
    draw = np.random.default_rng(seed)
    schedules = ["cosine", "linear", "constant_with_warmup"]
    plans = []
    for _ in range(num):
        rank, rows = 2 ** int(draw.integers(2, 7)), 2 ** int(draw.integers(2, 5))
        plans.append(plan(10 ** draw.uniform(-4.3, -2.2), schedules[draw.integers(3)], rank, rows))
    return plans, [losses(each, draw, **options) for each in plans]
