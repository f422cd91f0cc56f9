"""The annealing law: the model of a learning curve before anything of it is known.

Let y(t) be the logarithm of the held-out loss of trial i at step t:

    y(t) = level_i + learning_i * phi(t) + cost_i * rho(t) + drift_i(t) + noise_i(t)

    phi(t) = (S(t) / S_ref) ** -a                         what is left to learn, after the summed rate S(t)
    rho(t) = k * log(1 + (rate(t) / rate_ref) ** g / k)   what the present rate costs while it lasts

A power law of the summed rate, and a loss that falls as the rate is annealed: Tissue et al., arXiv 2408.11029. Here it
is stated for the logarithm of the loss, with the present rate in place of their annealing area. Drift is Brownian in
log(t), so that a forecast starts from the latest evaluations. Level, learning and cost of a trial are those of the
sweep plus linear effects of its values plus effects of its own (a linear mixed model). All is linear and Gaussian, up
to one unknown common scale. The derivation is in docs/forecast.md.
"""

import statistics
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEARNING_EXPONENT: Final = 0.3
"""a of phi."""
COST_EXPONENT: Final = 1.3
"""g of rho."""
SATURATION: Final = 4.0
"""k of rho: a rate many times the reference costs less than in proportion."""
ROWS_EXPONENT: Final = 0.5
"""Power of the rows of a step in the summed rate. Under Adam, a step over n times the rows is worth sqrt(n) steps
(Malladi et al., arXiv 2205.10287)."""
REFERENCE_SHARE: Final = 0.05
"""S_ref is the summed rate of this share of a trial at the reference rate."""

LEVEL_SD: Final = 0.15
"""Standard deviation of a trial's own effect on its level, in units of log loss before the common scale."""
LEARNING_SD: Final = 0.1
"""The same for its learning."""
COST_SD: Final = 0.02
"""The same for its cost."""
DRIFT_SD: Final = 0.03
"""Standard deviation of the drift while the step grows e-fold."""
RATE_DRIFT_SD: Final = 0.03
"""Standard deviation of further drift, times rate / rate_ref."""
NOISE_SD: Final = 0.003
"""Standard deviation of an evaluation's noise."""
RATE_NOISE_SD: Final = 0.006
"""Standard deviation of further noise, times rate / rate_ref."""
MAX_RATE_RATIO: Final = 10.0
"""Largest rate / rate_ref for drift and noise."""

PRIOR_MEAN: Final = np.array([0.0, 0.0, 0.0, 0.0, 0.15, 0.08, 0.0, 0.0, 0.0])
"""Mean of the sweep's effects: level and its slopes by rate, rank and rows; learning; cost and its slopes."""
PRIOR_SD: Final = np.array([3.0, 0.05, 0.05, 0.05, 0.2, 0.15, 0.05, 0.05, 0.05])
"""Standard deviations of the same. They are wide: a tight prior that is wrong costs more than none."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of a trial before it starts. Arrays have one entry for each planned evaluation."""

    steps: Array
    """Optimizer steps, ascending; the last one is the end of the trial."""
    rates: Array
    """Learning rate of the step before the evaluation."""
    summed: Array
    """Sum of the learning rates of all steps before the evaluation."""
    peak: float
    """Configured learning rate."""
    rank: float
    """Rank of the adapter."""
    rows: float
    """Rows of an optimizer step."""

    @property
    def num_evaluations(self) -> int:
        """Number of planned evaluations."""
        return len(self.steps)


@dataclass(frozen=True, eq=False)
class Design:
    """The law of n trials in matrices, with p effects of the sweep. Trials have up to k evaluations; others are padded
    with copies of their last one."""

    effects: Array
    """(n, k, p): factors of the sweep's effects."""
    covariance: Array
    """(n, k, k): covariance of a trial's own effects and its drift."""
    noise: Array
    """(n, k): variance of the noise."""


def design(plans: list[Plan]) -> Design:
    """Return the matrices of a sweep's trials.

    The reference rate is the geometric mean of the learning rates, so that no constant depends on the space.
    """
    num = max(plan.num_evaluations for plan in plans)
    at = [np.minimum(np.arange(num), plan.num_evaluations - 1) for plan in plans]
    steps, rates, summed = (
        np.stack([getattr(plan, name)[places] for plan, places in zip(plans, at, strict=True)])
        for name in ("steps", "rates", "summed")
    )
    reference = geometric_mean([plan.peak for plan in plans])
    rows = np.array([plan.rows for plan in plans])
    summed = summed * ((rows / geometric_mean(rows)) ** ROWS_EXPONENT)[:, None]
    unit = REFERENCE_SHARE * reference * np.median([plan.steps[-1] for plan in plans])
    ratio = rates / reference
    phi = np.maximum(summed / unit, 1e-3) ** -LEARNING_EXPONENT
    rho = SATURATION * np.log1p(ratio**COST_EXPONENT / SATURATION)
    one = np.ones_like(phi)
    values = _values(plans)[:, None, :]
    level, cost = one[..., None], rho[..., None]
    effects = np.concatenate([level, level * values, phi[..., None], cost, cost * values], axis=-1)
    own = np.stack([LEVEL_SD * one, LEARNING_SD * phi, COST_SD * rho], axis=-1)
    ratio = np.minimum(ratio, MAX_RATE_RATIO)
    log_steps = np.log(steps)
    gaps = np.diff(log_steps, axis=1, prepend=log_steps[:, :1] - np.log(2))
    drift = np.cumsum(gaps * (DRIFT_SD**2 + (RATE_DRIFT_SD * ratio) ** 2), axis=1)
    earlier = np.minimum.outer(np.arange(num), np.arange(num))
    return Design(
        effects=effects,
        covariance=own @ own.transpose(0, 2, 1) + drift[:, earlier],
        noise=NOISE_SD**2 + (RATE_NOISE_SD * ratio) ** 2,
    )


def geometric_mean(values: Array | list[float]) -> float:
    """Return the geometric mean of positive numbers: the same bits in any order, so that a resume decides the same."""
    return statistics.geometric_mean(values)


def _values(plans: list[Plan]) -> Array:
    """Return (n, 3): learning rate and rank in factors of 4, rows in factors of 2, relative to their means."""
    logs = np.log2([[plan.peak, plan.rank, plan.rows] for plan in plans])
    relative: Array = (logs - logs.mean(axis=0)) * np.array([0.5, 0.5, 1.0])
    return relative
