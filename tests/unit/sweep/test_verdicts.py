"""Which trials the forecast stops, and how it says why."""

import numpy as np
import pytest
from annealed import losses, plan, sweep

from orchestrator.sweep.schedulers.forecast.law import Plan
from orchestrator.sweep.schedulers.forecast.verdicts import MIN_SEEN, Trial, default_chance, outcomes, verdicts

CHANCE = 0.02


def trials(plans: dict[str, Plan], seen: int, seed: int = 0, **changed: list[float]) -> list[Trial]:
    draw = np.random.default_rng(seed)
    curves = {name: losses(each, draw) for name, each in plans.items()} | {n: np.array(c) for n, c in changed.items()}
    return [Trial(name, each, curves[name][:seen]) for name, each in plans.items()]


def judged(found: list[Trial], chance: float = CHANCE) -> dict[str, str]:
    return verdicts(found, {trial.name for trial in found}, chance)


GOOD = {f"good{i}": plan(rate) for i, rate in enumerate((6e-4, 8e-4, 1e-3, 1.2e-3, 1.5e-3))}


def test_a_trial_that_is_too_slow_stops_with_its_numbers() -> None:
    stops = judged(trials(GOOD | {"slow": plan(5e-5)}, 6))
    best = min(trials(GOOD, 20), key=lambda trial: trial.losses[-1]).name
    assert "slow" in stops
    assert best not in stops
    assert stops["slow"].startswith("too slow, loss ")
    assert " at step 120: forecast " in stops["slow"]
    assert "the second best, as the leader has over a quarter to go, is forecast" in stops["slow"]
    assert stops["slow"].endswith("% chance of beating it")


def test_no_trial_stops_before_its_second_evaluation() -> None:
    plans = GOOD | {"slow": plan(3e-5)}
    assert MIN_SEEN == 2
    assert judged(trials(plans, 1), 0.5) == {}
    assert "slow" in judged(trials(plans, 5))


def test_the_outcome_of_a_trial_that_stops_is_the_one_that_its_sentence_gives() -> None:
    found = trials(GOOD | {"slow": plan(5e-5)}, 6)
    outcome = outcomes(found)["slow"]
    slow = next(trial for trial in found if trial.name == "slow")
    assert f"forecast {outcome:.3g} +- " in judged(found)["slow"]
    assert outcome < slow.losses[-1]


def test_the_outcome_of_a_trial_that_overfits_is_its_lowest_loss() -> None:
    plans = GOOD | {"rising": plan(6e-4, "constant_with_warmup")}
    rising = [0.9, 0.85, 0.84, *np.linspace(0.85, 1.0, 17)]
    found = trials(plans, 17, rising=rising)
    assert outcomes(found)["rising"] == pytest.approx(0.84)


def test_a_high_rate_that_has_yet_to_fall_is_kept_though_its_loss_is_the_worst() -> None:
    """ASHA and the median rule would stop it."""
    plans = GOOD | {"high": plan(4e-3)}
    found = trials(plans, 9)
    latest = {trial.name: trial.losses[-1] for trial in found}
    assert latest["high"] == max(latest.values())
    assert "high" not in judged(found)


def test_a_trial_that_stays_behind_after_its_rate_fell_says_so() -> None:
    plans = GOOD | {"behind": plan(3e-3)}
    curve = 1.12 * losses(plans["behind"], np.random.default_rng(4))
    assert "to go once the rate has fallen: forecast" in judged(trials(plans, 8, behind=[*curve]))["behind"]


def test_a_diverged_trial_is_told_by_where_the_others_began() -> None:
    plans = GOOD | {"wild": plan(9e-3)}
    curve = [*np.exp(np.linspace(0.4, 1.8, 20))]
    stops = judged(trials(plans, 6, wild=curve))
    assert stops["wild"].startswith("diverged, loss 2.16 at step 120, where the sweep's first evaluations were ")


def test_a_trial_that_may_have_diverged_is_no_yardstick() -> None:
    """Extrapolated, its fall would beat all others."""
    plans = GOOD | {"wild": plan(9e-3)}
    stops = judged(trials(plans, 12, wild=[*np.exp(np.linspace(0.6, 0.0, 20))]), 0.3)
    assert not any("wild, " in why for why in stops.values())


def test_overfit_and_plateau_are_told_apart() -> None:
    flat = {"rising": plan(6e-4, "constant_with_warmup"), "level": plan(2e-4, "constant_with_warmup")}
    rising = [0.9, 0.85, 0.84, *np.linspace(0.85, 1.0, 17)]
    level = [1.2, 1.05, 1.01, *[1.0] * 17]
    stops = judged(trials(GOOD | flat, 17, rising=rising, level=level))
    assert stops["rising"].startswith("overfits, loss ")
    assert "after 0.84 at step 60: forecast" in stops["rising"]
    assert stops["level"].startswith("on a plateau, loss 1 at step 340: forecast")


def test_the_leader_is_never_stopped_nor_a_trial_alone() -> None:
    assert judged(trials({"only": plan(1e-3)}, 10), 0.5) == {}
    found = trials(GOOD, 15)
    stops = judged(found, 0.5)
    assert min(found, key=lambda trial: trial.losses[-1]).name not in stops


def test_only_trials_that_report_are_stopped() -> None:
    found = trials(GOOD | {"slow": plan(5e-5)}, 6)
    names = {trial.name for trial in found}
    assert "slow" in verdicts(found, names, CHANCE)
    assert "slow" not in verdicts(found, names - {"slow"}, CHANCE)


def test_a_trial_that_has_ended_counts_by_its_lowest_loss() -> None:
    """Its own forecast would be lower, but no more evaluations come."""
    found = trials(GOOD, 12)
    ended = Trial("ended", plan(1e-3), found[0].losses[:2] * 0.99, is_running=False)
    assert "ended" not in " ".join(judged([*found, ended], 0.5).values())
    low = Trial("ended", plan(1e-3), np.array([0.9, 0.1]), is_running=False)
    stops = judged([*found, low])
    assert stops.keys() == {trial.name for trial in found}, "none can reach 0.1"
    assert "ended, the leader, is forecast 0.1;" in stops["good0"]


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize(("noise", "least", "most"), [(0.001, 22, 0.002), (0.01, 17, 0.004)])
def test_the_best_of_sixteen_is_kept_at_less_than_half_of_the_evaluations(
    scale: float, noise: float, least: int, most: float
) -> None:
    """All report together, as in a pack; curves of other units and other noise."""
    kept, spent, regret = 0, [], []
    for seed in range(25):
        plans, curves = sweep(16, seed, noise=noise, scale=scale)
        seen, running = [0] * 16, {*range(16)}
        for step in range(1, 21):
            for i in running:
                seen[i] = step
            known = [Trial(str(i), plans[i], curves[i][: seen[i]], i in running) for i in range(16)]
            if step < 20:
                running -= {int(name) for name in verdicts(known, {str(i) for i in running}, default_chance(16))}
        best = min(range(16), key=lambda i: curves[i].min())
        kept += seen[best] == 20
        spent.append(sum(seen) / 320)
        regret.append(min(curves[i][: seen[i]].min() for i in range(16)) / curves[best].min() - 1)
    assert kept >= least
    assert np.mean(spent) < 0.5
    assert np.mean(regret) < most
