"""How much each searched field mattered: Optuna's PED-ANOVA for the shares, an additive model for the effects."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from orchestrator.analysis.effects import Effect, coordinate_of, find_effects
from orchestrator.analysis.outcomes import Outcomes, find_outcomes
from orchestrator.analysis.sweep_data import SweepData
from orchestrator.deploy.recommend import CONFIDENCE
from orchestrator.spec.axes import Axis
from orchestrator.spec.search import LOSS

MIN_TRIALS: Final = 6
"""Trials with an outcome below which nothing is said of importances."""
RESAMPLES: Final = 60
"""Bootstrap draws of the trials, for the intervals of the shares."""
SIGNIFICANCE: Final = 0.05
_MOST_DRAWN: Final = 3000
"""Trials drawn in all bootstrap draws together: with more trials, fewer draws are needed."""


@dataclass(frozen=True)
class Importance:
    """How much a field mattered."""

    field: str
    share: float
    """Share of the importance of all fields by PED-ANOVA, 0 to 1: mean over bootstrap draws."""
    share_low: float
    share_high: float
    """Bounds of the bootstrap `CONFIDENCE` interval of the share."""
    effect: Effect
    matters: bool
    """Whether the effect is significant at `SIGNIFICANCE`, corrected for the number of fields (Holm, 1979)."""


@dataclass(frozen=True)
class Importances:
    """The importances of all fields, the largest first, or why there are none."""

    fields: list[Importance]
    why_none: str
    """Why nothing can be said; empty if something can."""
    outcomes: Outcomes
    is_log: bool
    """Whether effects are changes of the logarithm of the metric."""


def find_importances(data: SweepData) -> Importances:
    """Return how much each searched field mattered.

    A trial that was stopped early counts with its forecast loss. A trial that diverged counts as worse than all others
    in the shares; effects leave it out.
    """
    outcomes, is_log = find_outcomes(data), data.metric == LOSS
    num = len(outcomes.known)
    axes = {name: data.info.spec.search.space[name] for name in data.fields()}
    effects: dict[str, Effect] = {}
    if not axes:
        why = "no field was searched"
    elif num < MIN_TRIALS:
        why = f"{num} of the trials have a value, and at least {MIN_TRIALS} are needed"
    else:
        usable = [each for each in outcomes.known if each.value > 0] if is_log else outcomes.known
        leader = data.leader.config.varied if data.leader else {}
        effects = find_effects(axes, usable, is_log, data.sign == 1, leader)
        why = "" if effects else "each searched field has the same value in all trials"
    if why:
        return Importances([], why, outcomes, is_log)
    kept = {name: axis for name, axis in axes.items() if name in effects}
    shares = _shares(kept, outcomes, data.sign)
    significant = _holm({name: effect.p_value for name, effect in effects.items()})
    found = [Importance(name, *shares[name], effect, name in significant) for name, effect in effects.items()]
    return Importances(sorted(found, key=lambda each: -each.share), "", outcomes, is_log)


def _holm(p_values: dict[str, float]) -> set[str]:
    """Return the names whose p-values are significant after Holm's correction."""
    found: set[str] = set()
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for i, name in enumerate(ordered):
        if p_values[name] > SIGNIFICANCE / (len(ordered) - i):
            break
        found.add(name)
    return found


def _shares(axes: dict[str, Axis], outcomes: Outcomes, sign: int) -> dict[str, tuple[float, float, float]]:
    """Return share, low and high of each field: mean and interval over draws of the trials and of their forecasts."""
    trials = [each.trial for each in outcomes.known] + outcomes.diverged
    points = [{name: trial.config.varied[name] for name in axes if name in trial.config.varied} for trial in trials]
    with _quiet_optuna():
        random, draws = np.random.default_rng(0), []
        for _ in range(max(10, min(RESAMPLES, _MOST_DRAWN // len(trials)))):
            costs = _drawn_costs(outcomes, sign, random)
            drawn = random.integers(len(trials), size=len(trials))
            draws.append(_ped_anova(list(axes), [_optuna_trial(axes, points[i], costs[i]) for i in drawn]))
    tail = (1 - CONFIDENCE) / 2
    found = {name: np.array([draw[name] for draw in draws]) for name in axes}
    return {
        name: (float(each.mean()), float(np.quantile(each, tail)), float(np.quantile(each, 1 - tail)))
        for name, each in found.items()
    }


def _drawn_costs(outcomes: Outcomes, sign: int, random: np.random.Generator) -> list[float]:
    """Return costs, lower is better: a forecast is drawn from its distribution; diverged trials are the worst."""
    best = min(each.value for each in outcomes.known)
    costs = []
    for each in outcomes.known:
        value = each.value
        if each.is_forecast and each.trial.best:
            drawn = value * float(np.exp(np.clip(each.log_sd * random.standard_normal(), -50, 50)))
            value = min(max(drawn, best), each.trial.best.value)
        costs.append(sign * value)
    return costs + [max(costs) + 1.0] * len(outcomes.diverged)


def _optuna_trial(axes: dict[str, Axis], point: dict[str, Any], cost: float) -> Any:
    """Return a trial for Optuna. A category is its place in the list; numbers keep their order."""
    import optuna

    params: dict[str, Any] = {}
    distributions: dict[str, Any] = {}
    for name, value in point.items():
        coordinate = coordinate_of(axes[name])
        params[name] = coordinate.at(value)
        if coordinate.is_category:
            params[name] = int(params[name])
            distributions[name] = optuna.distributions.CategoricalDistribution(range(len(coordinate.values)))
        else:
            params[name] = min(max(params[name], -1.0), 1.0)
            distributions[name] = optuna.distributions.FloatDistribution(-1.0, 1.0)
    return optuna.trial.create_trial(params=params, distributions=distributions, value=cost)


def _ped_anova(names: Sequence[str], frozen: Sequence[Any]) -> dict[str, float]:
    """Return the share of each field in reaching the best trials; equal shares if PED-ANOVA finds none."""
    import optuna

    study = optuna.create_study()
    study.add_trials(frozen)
    quantile = min(0.5, max(0.1, 5 / len(frozen)))  # five trials or more at the top, as Optuna advises
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    found = evaluator.evaluate(study)
    total = sum(found.values())
    return {name: found.get(name, 0.0) / total if total > 0 else 1 / len(names) for name in names}


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keep Optuna's progress and its advice about few trials from the terminal: the intervals say the same."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
