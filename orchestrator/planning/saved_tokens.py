"""What stopping rules leave of the tokens of a sweep, measured on whole curves (docs/forecast.md)."""

from collections.abc import Mapping

import numpy as np

from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import AshaScheduler, ForecastScheduler, MedianScheduler, NoScheduler

_TRIALS = (8, 16, 32, 64)

_SHARES: Mapping[str, tuple[float, ...]] = {
    "forecast": (0.47, 0.36, 0.34, 0.32),
    "asha": (0.43, 0.34, 0.29, 0.29),  # not measured with 64: as with 32
    "median": (0.43, 0.42, 0.44, 0.44),
}
"""Rule -> share of the tokens of all trials that is trained, for each of `_TRIALS`."""

_MOST = 0.60
"""The largest share of the forecast on altered tables: with an evaluation every 100 steps."""


def shares_of(spec: SweepSpec) -> tuple[float, float] | None:
    """Return the smallest and the largest share of the tokens that a stopping rule leaves; None if it is not known.

    Known are the forecast, ASHA with factor 3 and the median rule, on one base and one data set. The smallest is that
    of as many trials, interpolated; the largest is what the forecast left where it saved least. Below 8 trials a rule
    may stop none.
    """
    scheduler, number = spec.scheduler, spec.search.total_trials
    known = isinstance(scheduler, ForecastScheduler | MedianScheduler)
    known = known or (isinstance(scheduler, AshaScheduler) and scheduler.reduction_factor == 3)
    if not known or isinstance(scheduler, NoScheduler) or number == 1:
        return None
    least = float(np.interp(number, _TRIALS, _SHARES[scheduler.kind]))
    return least, _MOST if number >= _TRIALS[0] else 1.0


def trained_shares(number: int, share: float) -> list[float]:
    """Return the share of its steps that each trial makes: the best one all, the others as many as each other.

    Args:
        number: of trials.
        share: of all of their tokens.
    """
    if number == 1:
        return [1.0]
    other = min(1.0, max(0.05, (share * number - 1) / (number - 1)))
    return [1.0, *[other] * (number - 1)]
