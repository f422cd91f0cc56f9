"""The posterior and the forecast, on simulated curves whose end is known."""

from itertools import permutations

import numpy as np
import pytest
from annealed import losses, plan, sweep
from numpy.typing import NDArray

from orchestrator.sweep.schedulers.forecast.calibration import intervals_held
from orchestrator.sweep.schedulers.forecast.law import PRIOR_MEAN, PRIOR_SD, Plan, design, geometric_mean
from orchestrator.sweep.schedulers.forecast.posterior import SCALE_STRENGTH, Forecast, forecast
from orchestrator.sweep.schedulers.forecast.verdicts import Trial

Curves = list[NDArray[np.float64]]


def after(seen: int, plans: list[Plan], curves: Curves) -> Forecast:
    """Return the forecast once each trial has been evaluated so often."""
    return forecast(plans, [np.log(curve[:seen]) for curve in curves], np.ones(len(plans), bool))


def test_the_intervals_hold_the_last_loss_as_often_as_they_say() -> None:
    inside = []
    for seed in range(20):
        plans, curves = sweep(16, seed)
        for seen in (3, 6, 10, 15):
            found = after(seen, plans, curves)
            inside += [*(np.abs(np.log([curve[-1] for curve in curves]) - found.mean) < 1.96 * found.sd())]
    assert 0.9 < np.mean(inside) <= 1.0


def test_calibration_counts_whole_trials_only() -> None:
    plans, curves = sweep(8, 4)
    trials = [Trial(str(i), plans[i], curves[i] if i < 5 else curves[i][:3]) for i in range(8)]
    assert len(intervals_held(trials, 6)) == 5
    wrong = [Trial("0", plans[0], np.append(curves[0][:-1], 9.0)), *trials[1:]]
    assert intervals_held(wrong, 19)[0] is False
    assert sum(intervals_held(trials, 15)) >= 4


def test_a_forecast_is_closer_than_the_loss_as_it_stands() -> None:
    ahead, standing = [], []
    for seed in range(10):
        plans, curves = sweep(16, seed)
        ends = np.log([curve[-1] for curve in curves])
        ahead += [*np.abs(after(6, plans, curves).mean - ends)]
        standing += [*np.abs(np.log([curve[5] for curve in curves]) - ends)]
    assert np.median(ahead) < 0.25 * np.median(standing)


def test_intervals_narrow_as_curves_go_on() -> None:
    plans, curves = sweep(12, 3)
    spreads = [after(seen, plans, curves).sd().mean() for seen in (2, 5, 10, 15, 19)]
    assert spreads == sorted(spreads, reverse=True)
    whole = after(20, plans, curves)
    assert whole.mean == pytest.approx(np.log([curve[-1] for curve in curves]))
    assert not whole.covariance.any()


def test_other_curves_teach_what_the_fall_of_the_rate_brings() -> None:
    """A trial at a high rate is forecast lower once trials that fall early have shown what that is worth."""
    draw = np.random.default_rng(1)
    short = [plan(rate, "warmup_stable_decay", decay_steps=300) for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
    late = plan(3e-3, "warmup_stable_decay", decay_steps=60)
    curves = [losses(each, draw, noise=0.001) for each in [*short, late]]
    seen = [np.log(curve[:15]) for curve in curves]
    end = np.log(curves[-1][-1])
    alone = forecast([late], seen[-1:], np.ones(1, bool))
    together = forecast([*short, late], seen, np.ones(5, bool))
    assert together.sd()[-1] < alone.sd()[0]
    assert abs(together.mean[-1] - end) < abs(alone.mean[0] - end)


def test_a_curve_that_does_not_teach_changes_no_other_forecast() -> None:
    plans, curves = sweep(6, 2)
    seen = [np.log(curve[:6]) for curve in curves]
    teaches = np.array([True] * 5 + [False])
    odd = [*seen[:5], seen[5] + np.linspace(0, 2, 6)]
    assert forecast(plans, odd, teaches).mean[:5] == pytest.approx(forecast(plans, seen, teaches).mean[:5])


@pytest.mark.parametrize("power", [1.0, 0.3, 0.06])
def test_the_posterior_is_that_of_the_joint_normal_distribution(power: float) -> None:
    """The same forecast by conditioning one large normal vector, without whitening or effects."""
    plans, curves = sweep(4, 5)
    num_seen = [3, 5, 2, 7]
    law = design(plans)
    n, k, p = law.effects.shape
    flat = law.effects.reshape(n * k, p)
    covariance = flat @ np.diag(PRIOR_SD**2) @ flat.T
    for i in range(n):
        block = slice(i * k, (i + 1) * k)
        covariance[block, block] += law.covariance[i]
    seen = np.concatenate([i * k + np.arange(num) for i, num in enumerate(num_seen)])
    ends = np.arange(1, n + 1) * k - 1
    logs = [power * np.log(curve[:num]) for curve, num in zip(curves, num_seen, strict=True)]
    center = np.median([each[0] for each in logs])
    y = np.concatenate(logs) - center
    inner = covariance[np.ix_(seen, seen)] + np.diag(law.noise.ravel()[seen])
    gain = np.linalg.solve(inner, covariance[np.ix_(seen, ends)])
    expected = covariance[np.ix_(ends, ends)] - covariance[np.ix_(ends, seen)] @ gain
    expected += np.diag(law.noise.ravel()[ends])
    spread = 1.4826 * np.median(np.abs([each[0] - center for each in logs]))
    unit = min(1.0, spread / 0.13)
    off = y / unit - flat[seen] @ PRIOR_MEAN
    scale = (SCALE_STRENGTH + off @ np.linalg.solve(inner, off)) / (SCALE_STRENGTH + len(y))
    found = forecast(plans, logs, np.ones(4, bool))
    assert found.mean == pytest.approx(center + unit * (flat[ends] @ PRIOR_MEAN + off @ gain), abs=1e-6)
    assert found.covariance == pytest.approx(unit**2 * scale * expected, rel=1e-4, abs=1e-9)


def test_a_small_range_of_losses_is_forecast_as_closely_as_a_large_one() -> None:
    """Intervals follow the range; a prior in one fixed unit would leave them as wide as those of the large range."""
    plans, curves = sweep(16, 3)
    wide, narrow = after(3, plans, curves), after(3, plans, [curve**0.05 for curve in curves])
    assert narrow.sd().mean() < 0.08 * wide.sd().mean(), "a twentieth, but for the largest unit, which is 1"


def test_first_evaluations_that_are_all_equal_leave_a_forecast() -> None:
    """Such as those before the first step. Their spread is 0, and the unit must not be."""
    plans, curves = sweep(6, 4)
    found = after(5, plans, [np.array([2.0, *curve[1:]]) for curve in curves])
    assert np.isfinite(found.mean).all()
    assert (found.sd() > 0.001).all()


def test_the_unit_of_the_loss_does_not_matter() -> None:
    plans, curves = sweep(8, 7)
    found, scaled = after(6, plans, curves), after(6, plans, [30 * curve for curve in curves])
    assert scaled.mean - np.log(30) == pytest.approx(found.mean, abs=0.02)
    assert scaled.sd() == pytest.approx(found.sd(), rel=0.1)


def test_a_mean_has_the_same_bits_in_any_order() -> None:
    """Trials come in another order after a resume, and one of them may have exactly the mean rate."""
    assert len({geometric_mean(list(rates)) for rates in permutations([1e-5, 5e-3, 1e-4, 2e-5])}) == 1
