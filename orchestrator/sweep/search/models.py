"""Models of earlier results, by Optuna: where the next trial should be, and what it is expected to gain."""

import copy
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

SPREAD = 0.25
"""Standard deviation of the prior, as a share of an axis (PriorBand, arXiv 2306.12370, section 5)."""

Drawn = dict[str, Any]
"""Dotted field -> what an Optuna sampler draws for it."""


@dataclass(frozen=True)
class Forecast:
    """What the model expects at a point, in the metric's own unit, where lower is better."""

    mean: float
    spread: float
    """Standard deviation of the model's belief, without the noise of single results."""
    gain: float
    """Expected improvement on the best result so far; trials that do not improve on it count as zero."""


@dataclass(frozen=True)
class Proposal:
    """A point that a model proposes."""

    drawn: Drawn
    sampler: str
    """Name of the model."""
    forecast: Forecast | None
    """None where the model makes none, as TPE."""


def propose(
    space: Mapping[str, BaseDistribution],
    finished: Sequence[tuple[Drawn, float]],
    running: Sequence[Drawn],
    prior: Drawn,
    prior_weight: float,
    has_conditions: bool,
    seed: int,
) -> Proposal:
    """Propose the next point. It depends on the arguments only, so a resumed search proposes the same.

    A Gaussian process (Matern 5/2, log expected improvement) proposes where every field exists at every point and
    scipy, which Optuna's sampler needs, is installed; otherwise multivariate TPE, which takes running trials for bad
    ones ("constant liar").

    Args:
        space: field -> what its value is drawn from.
        finished: points and their results; lower is better, infinite for a trial that failed by its values.
        running: points whose results are not known.
        prior: the point around which good ones are believed to lie.
        prior_weight: weight of that belief in the choice of the Gaussian process; 0 for none.
        has_conditions: whether some fields exist only with others.
        seed: seed of the sampler.
    """
    values = _without_outliers([value for _, value in finished])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        gp = None
        if not has_conditions and find_spec("scipy") is not None:
            pending = [_trial(space, drawn, TrialState.RUNNING, None) for drawn in running]
            gp = _Gp(_trial(space, prior, TrialState.COMPLETE, 0.0), prior_weight, pending, seed)
        sampler: BaseSampler = gp or TPESampler(
            n_startup_trials=1, multivariate=True, group=True, constant_liar=True, seed=seed
        )
        study = optuna.create_study(sampler=sampler)
    for (drawn, _), value in zip(finished, values, strict=True):
        study.add_trial(_trial(space, drawn, TrialState.COMPLETE, value))
    for drawn in running:
        study.add_trial(_trial(space, drawn, TrialState.RUNNING, None))
    drawn = study.ask(dict(space)).params
    return Proposal(drawn, "Gaussian process" if gp else "TPE", gp.forecast(values) if gp else None)


class _Gp(GPSampler):  # type: ignore[misc]  # mypy skips optuna
    """Optuna's GP sampler with a prior, which also tells what it expects at the point that it proposes.

    The logarithm of the prior's density is added to the logarithm of the expected improvement (Hvarfner et al. 2022,
    arXiv 2204.11051, equation 6). Running trials count with the results that the model expects of them (the Kriging
    believer of Ginsbourger et al. 2010, "Kriging is well-suited to parallelize optimization"). Optuna's own choice, the
    improvement of the new point and the running ones together, hardly depends on the new point once the running ones
    promise more than it, and the prior alone would decide.
    """

    def __init__(self, prior: FrozenTrial, prior_weight: float, running: Sequence[FrozenTrial], seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=1, independent_sampler=RandomSampler(seed=seed))
        self._prior = prior
        self._prior_weight = prior_weight
        self._running = running
        self._standardized: tuple[float, float] | None = None
        """Mean and standard deviation at the proposed point, of standardized results where higher is better."""

    def _optimize_acqf(self, acqf: Any, best_params: Any) -> Any:
        import torch

        (model,) = self._gprs_cache_list
        if self._running:
            acqf = _believing(acqf, model, self._running)
        chosen = super()._optimize_acqf(_weighted(acqf, self._prior, self._prior_weight), best_params)
        with torch.no_grad():
            mean, variance = model.posterior(torch.from_numpy(chosen))
        self._standardized = float(mean), math.sqrt(float(variance))
        return chosen

    def forecast(self, values: Sequence[float]) -> Forecast | None:
        """Return the forecast at the proposed point in the unit of the results; None if it was drawn at random."""
        if self._standardized is None:
            return None
        unit = statistics.pstdev(values)
        mean, spread = statistics.fmean(values) - unit * self._standardized[0], unit * self._standardized[1]
        return Forecast(mean, spread, expected_gain(min(values), mean, spread))


def _believing(acqf: Any, model: Any, running: Sequence[FrozenTrial]) -> Any:
    """Return the logarithm of the expected improvement of one more point, if running trials end as the model expects.

    Args:
        acqf: Optuna's own acquisition function, for the space and the best result.
        model: the Gaussian process on the results.
        running: trials without a result.
    """
    import torch
    from optuna._gp.acqf import LogEI

    points = torch.from_numpy(acqf.search_space.get_normalized_params(running, [each.params for each in running]))
    with torch.no_grad():
        expected, _ = model.posterior(points)
    believer = copy.copy(model)
    believer.append_running_data(points, expected)
    best = max(acqf._threshold, float(expected.max()))
    return LogEI(believer, acqf.search_space, threshold=best)


def _weighted(acqf: Any, prior: FrozenTrial, weight: float) -> Any:
    """Return an acquisition function with the weighted logarithm of the prior's density added.

    The prior is normal around a point, with `SPREAD` in coordinates from 0 to 1. A category other than the point's own
    is as unlikely as a number one standard deviation away.
    """
    import torch
    from optuna._gp.acqf import BaseAcquisitionFunc

    class Weighted(BaseAcquisitionFunc):  # type: ignore[misc]  # mypy skips optuna
        def eval_acqf(self, x: Any) -> Any:
            away = torch.where(is_category, (x != center).to(x.dtype), (x - center) / SPREAD)
            return acqf.eval_acqf(x) - weight * 0.5 * (away**2).sum(-1)

    space = acqf.search_space
    center = torch.from_numpy(space.get_normalized_params([prior])[0])
    is_category = torch.from_numpy(space.is_categorical)
    return Weighted(acqf.length_scales, space)


def expected_gain(best: float, mean: float, spread: float) -> float:
    """Return the expected improvement E[max(best - y, 0)] for y normal (Jones et al. 1998, equation 15)."""
    if spread <= 0:
        return max(best - mean, 0.0)
    normal = statistics.NormalDist()
    z = (best - mean) / spread
    return (best - mean) * normal.cdf(z) + spread * normal.pdf(z)


def _without_outliers(values: Sequence[float]) -> list[float]:
    """Lower very bad results to twice the distance of the median from the best.

    A trial that diverges may have a hundred times the loss; beside it, the differences of good ones would vanish.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [1.0] * len(values)
    best = min(finite)
    cap = best + 2 * (statistics.median(finite) - best)
    if cap == best:
        cap = max(finite) if max(finite) > best else best + abs(best) + 1.0
    return [min(value, cap) if math.isfinite(value) else cap for value in values]


def _trial(space: Mapping[str, BaseDistribution], drawn: Drawn, state: TrialState, value: float | None) -> FrozenTrial:
    return create_trial(state=state, value=value, params=drawn, distributions={path: space[path] for path in drawn})
