"""The posterior of the annealing law given all curves of a sweep, and the forecast of each trial's last evaluation.

Bayesian linear regression with known covariances up to one scale (normal-inverse-gamma; Gelman et al., Bayesian Data
Analysis, 3rd edition, chapter 14). Running curves count as well as finished ones, as in freeze-thaw Bayesian
optimization (Swersky et al., arXiv 1406.3896).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.sweep.schedulers.forecast.law import PRIOR_MEAN, PRIOR_SD, Array, Design, Plan, design

USUAL_SPREAD: Final = 0.13
"""Spread of the log losses at the first evaluations of a sweep for which the prior of the law is stated: the median
absolute deviation of trials over a wide range of learning rates, times 1.48."""
LEAST_UNIT: Final = 0.02
"""Smallest unit of log loss, relative to the usual spread."""
SCALE_STRENGTH: Final = 8.0
"""Number of evaluations that the prior of the common scale, which is 1, is worth."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """The joint normal distribution of the log loss of n trials at their last evaluations."""

    mean: Array
    """(n,): of a trial that has ended, what was measured."""
    covariance: Array
    """(n, n)"""

    def sd(self) -> Array:
        """Return the standard deviation of each trial's forecast, (n,)."""
        return np.sqrt(self.covariance.diagonal())


def forecast(plans: list[Plan], curves: list[Array], teaches: NDArray[np.bool_]) -> Forecast:
    """Return the forecast of all trials.

    Args:
        plans: what is known of each trial beforehand, n of them.
        curves: each trial's log losses at its first evaluations, as many as there are; at least one for each trial.
        teaches: (n,), whether the posterior of the sweep's effects uses the trial's curve.
    """
    law = design(plans)
    num_seen = np.array([len(curve) for curve in curves])
    is_seen = np.arange(law.noise.shape[1]) < num_seen[:, None]
    y = np.zeros(is_seen.shape)
    y[is_seen] = np.concatenate(curves)
    center, unit = _center_and_unit(np.array([curve[0] for curve in curves]))
    root, effects, residual_y = _whitened(law, is_seen, np.where(is_seen, (y - center) / unit, 0.0))
    coefficients, spread, scale = _sweep_effects(effects[teaches], residual_y[teaches], int(num_seen[teaches].sum()))

    rows, last = np.arange(len(plans)), np.array([plan.num_evaluations - 1 for plan in plans])
    link = np.linalg.solve(root, (law.covariance[rows, last] * is_seen)[..., None])[..., 0]
    left = law.effects[rows, last] - np.einsum("nk,nkp->np", link, effects)
    mean = center + unit * (left @ coefficients + (link * residual_y).sum(axis=1))
    own = np.maximum(law.covariance[rows, last, last] - (link**2).sum(axis=1), 0.0) + law.noise[rows, last]
    covariance = unit**2 * scale * (np.diag(own) + left @ spread @ left.T)
    has_ended = num_seen > last
    mean = np.where(has_ended, y[rows, last], mean)
    covariance[has_ended, :] = covariance[:, has_ended] = 0.0
    return Forecast(mean, covariance)


def _center_and_unit(first: Array) -> tuple[float, float]:
    """Return the center of the first log losses, (n,), and the unit in which the law's prior holds for the sweep.

    On some tasks trials differ less than on others: by 1% rather than 20%. All effects are then smaller by as much.
    """
    center = float(np.median(first))
    spread = 1.4826 * float(np.median(np.abs(first - center)))
    return center, float(np.clip(spread / USUAL_SPREAD, LEAST_UNIT, 1.0))


def _whitened(law: Design, is_seen: NDArray[np.bool_], y: Array) -> tuple[Array, Array, Array]:
    """Return each trial's Cholesky root, and effects and log losses multiplied by its inverse; zeros where not seen."""
    covariance = law.covariance * (is_seen[:, :, None] & is_seen[:, None, :])
    diagonal = np.arange(is_seen.shape[1])
    covariance[:, diagonal, diagonal] += np.where(is_seen, law.noise, 1.0)
    root = np.linalg.cholesky(covariance).astype(np.float64)
    both: Array = np.linalg.solve(root, np.concatenate([law.effects * is_seen[..., None], y[..., None]], axis=-1))
    return root, both[..., :-1], both[..., -1]


def _sweep_effects(effects: Array, y: Array, num_seen: int) -> tuple[Array, Array, float]:
    """Return posterior mean and covariance of the sweep's effects, and the common scale of all variances."""
    prior_precision = np.diag(PRIOR_SD**-2.0)
    precision = prior_precision + np.einsum("nkp,nkq->pq", effects, effects)
    spread = np.linalg.inv(precision)
    mean = spread @ (prior_precision @ PRIOR_MEAN + np.einsum("nkp,nk->p", effects, y))
    misfit = (y**2).sum() + PRIOR_MEAN @ prior_precision @ PRIOR_MEAN - mean @ precision @ mean
    return mean, spread, float((SCALE_STRENGTH + misfit) / (SCALE_STRENGTH + num_seen))
