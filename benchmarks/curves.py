"""Tables of learning curves on which stopping rules are tried: simulated bases, and alterations of a recorded table.

The simulated curves do not follow the law of the forecast. They are those of a noisy quadratic model (Zhang et al.
2019, "Which Algorithmic Choices Matter at Which Batch Sizes?", arXiv 1907.04164): each of many directions has a
curvature h, and its squared error e changes with each step at rate r over b rows by

    e <- (1 - r h) ** 2 e + r ** 2 h / b

A high rate learns fast and keeps the noise of the gradient high until it falls; a rate above 2 / h diverges. The rank
limits how many directions can be learned. A trial that diverges does not recover. Added are overfit, effects of the
seed, drift, and noise of evaluations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.spec.sections import TrainingSection
from orchestrator.sweep.schedulers.forecast.rates import learning_rates

Array = NDArray[np.float64]
Table = dict[str, Any]
"""A table of the form of `shared/data/curves`: steps, and trials with `config` and `evaluations`."""

NUM_TRIALS: Final = 64
DIRECTIONS: Final = 256
UNSTABLE_RATE: Final = 8e-3
"""Learning rate at which the sharpest direction diverges."""
CEILING: Final = 30.0
"""Largest squared error of a direction, relative to where it starts: losses of diverged trials are finite."""
DIVERGED: Final = 1.3
"""A trial that has risen to this multiple of where it started has diverged."""
LOST: Final = 0.4
"""A trial that has diverged stays above this share of its highest loss, as on a real base."""
SCHEDULES: Final = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class Base:
    """A simulated base on simulated data."""

    loss: float = 1.0
    """Lowest last loss."""
    spread: float = 0.2
    """How much higher the median of the last losses is, as a share."""
    evaluations: int = 20
    steps: int = 400
    noise: float = 0.002
    """Standard deviation of an evaluation, as a share of the loss."""
    seeds: float = 0.1
    """Standard deviation of a trial's own effect, as a share of `spread`."""
    schedules: tuple[str, ...] = SCHEDULES
    rates: tuple[float, float] = (3e-5, 1e-2)
    overfit: float = 0.0
    """How much the loss rises by the end at a middle rate, as a share of `spread`."""
    decay: float = 1.0
    """Power with which curvature falls from one direction to the next."""


SIMULATED: Final[dict[str, Base]] = {
    "plain": Base(),
    "loss 3, range 10%": Base(loss=3.0, spread=0.1),
    "loss 0.5, range 30%": Base(loss=0.5, spread=0.3),
    "range 5%": Base(spread=0.05),
    "range 2%": Base(loss=2.0, spread=0.02, noise=0.001),
    "range 1%": Base(loss=2.0, spread=0.01, noise=0.0005),
    "4 evaluations": Base(evaluations=4),
    "8 evaluations": Base(evaluations=8),
    "16 evaluations, range 5%": Base(evaluations=16, spread=0.05),
    "24 evaluations, 1200 steps": Base(evaluations=24, steps=1200),
    "noise 0.05%": Base(noise=0.0005),
    "noise 1%": Base(noise=0.01),
    "noise 1%, range 5%": Base(noise=0.01, spread=0.05),
    "warmup, stable, decay": Base(schedules=("warmup_stable_decay",)),
    "constant rates": Base(schedules=("constant_with_warmup",)),
    "cosine only, range 5%": Base(schedules=("cosine",), spread=0.05),
    "high rates": Base(rates=(1e-3, 2e-2)),
    "low rates": Base(rates=(1e-5, 1e-3)),
    "overfit": Base(overfit=1.0),
    "steep spectrum": Base(decay=1.5),
}


def simulated(name: str, seed: int = 0) -> Table:
    """Return a simulated table of 64 trials by random search."""
    base = SIMULATED[name]
    draw = np.random.default_rng([seed, *name.encode()])
    trials = [_configuration(base, draw) for _ in range(NUM_TRIALS)]
    return {"steps": base.steps, "trials": trained(base, trials, trials, draw)}


def trained(
    base: Base, trials: list[dict[str, Any]], reference: list[dict[str, Any]], draw: np.random.Generator
) -> list[dict[str, Any]]:
    """Return the curves of trials, in the form of a table.

    Args:
        base: the simulated base.
        trials: configurations.
        reference: configurations of the trials whose last losses have the base's `loss` and `spread`.
        draw: draws seeds, drift and noise.
    """
    at = np.unique(np.linspace(0, base.steps, base.evaluations + 1)[1:].round().astype(int))
    left, rates = _left(base, trials)
    others, other_rates = _left(base, reference)
    last = np.sort(others[:, -1])
    lowest, median = last[0], last[len(last) // 2]
    relative = 1 + base.spread * (left[:, at - 1] - lowest) / (median - lowest)
    summed = np.cumsum(rates, axis=1)[:, at - 1]
    relative += base.overfit * base.spread * (summed / np.median(other_rates.sum(axis=1))) ** 2 / 4
    logs = np.log(np.minimum(relative, 12 / base.loss))
    gaps = np.diff(np.log(at), prepend=np.log(at[0] / 2))
    logs += base.seeds * base.spread * draw.normal(size=(len(trials), 1))
    logs += 0.03 * base.spread * np.cumsum(draw.normal(size=logs.shape) * np.sqrt(gaps), axis=1)
    logs += base.noise * draw.normal(size=logs.shape)
    losses = base.loss * np.exp(logs)
    return [
        {"config": trial, "evaluations": [[int(s), int(s) * 1000, float(x)] for s, x in zip(at, row, strict=True)]}
        for trial, row in zip(trials, losses, strict=True)
    ]


def _left(base: Base, trials: list[dict[str, Any]]) -> tuple[Array, Array]:
    """Return what is left to learn after each step, and the rates of all steps, both (trials, steps)."""
    sections = [_section(base, trial) for trial in trials]
    rates = np.stack([learning_rates(section, base.steps) for section in sections])
    return _quadratic(base, rates, np.array([section.batch_size for section in sections]), _ranks(trials)), rates


def _configuration(base: Base, draw: np.random.Generator) -> dict[str, Any]:
    low, high = np.log(base.rates)
    schedule = base.schedules[draw.integers(len(base.schedules))]
    config = {
        "training.learning_rate": float(np.exp(draw.uniform(low, high))),
        "training.schedule": schedule,
        "training.batch_size": int(2 ** draw.integers(2, 5)),
        "lora.rank": int(2 ** draw.integers(2, 7)),
    }
    if schedule == "warmup_stable_decay":
        config["training.decay_steps"] = base.steps // 5
    return config


def _section(base: Base, config: dict[str, Any]) -> TrainingSection:
    written = {key.removeprefix("training."): value for key, value in config.items() if key.startswith("training.")}
    return TrainingSection(steps=base.steps, **written)


def _ranks(trials: list[dict[str, Any]]) -> Array:
    return np.array([float(trial["lora.rank"]) for trial in trials])


def _quadratic(base: Base, rates: Array, rows: NDArray[np.int64], ranks: Array) -> Array:
    """Return what is left to learn after each step, (trials, steps)."""
    direction = np.arange(1, DIRECTIONS + 1)
    curvature = direction**-base.decay
    is_learned = direction <= DIRECTIONS * (ranks[:, None] / 64) ** 0.25
    error = np.ones((len(rates), DIRECTIONS))
    left = np.empty(rates.shape)
    scale = 2 / UNSTABLE_RATE
    for step in range(rates.shape[1]):
        rate = np.where(is_learned, scale * rates[:, step, None], 0.0)
        error = (1 - rate * curvature) ** 2 * error + rate**2 * curvature / rows[:, None]
        error = np.minimum(error, CEILING)
        left[:, step] = (curvature * error).sum(axis=1)
    highest = np.maximum.accumulate(left, axis=1)
    return np.where(highest > DIVERGED * curvature.sum(), np.maximum(left, LOST * highest), left)


def every(table: Table, number: int) -> Table:
    """Return a table with every so-manyth evaluation, counted from the end."""
    return _with_evaluations(table, lambda found: found[::-1][::number][::-1])


def powered(table: Table, power: float) -> Table:
    """Return a table whose logarithmic losses differ from the lowest one by this factor: a smaller range."""
    lowest = min(point[2] for trial in table["trials"] for point in trial["evaluations"])
    return _with_evaluations(
        table, lambda found: [[step, tokens, lowest * (loss / lowest) ** power] for step, tokens, loss in found]
    )


def raised(table: Table, amount: float) -> Table:
    """Return a table with this much more loss at every evaluation."""
    return _with_evaluations(table, lambda found: [[step, tokens, loss + amount] for step, tokens, loss in found])


def noisier(table: Table, noise: float, seed: int = 0) -> Table:
    """Return a table with noise of this standard deviation, as a share of the loss, on each evaluation."""
    draw = np.random.default_rng(seed)
    return _with_evaluations(
        table, lambda found: [[step, tokens, loss * np.exp(noise * draw.normal())] for step, tokens, loss in found]
    )


def _with_evaluations(table: Table, change: Callable[[list[list[float]]], list[list[float]]]) -> Table:
    return table | {
        "trials": [trial | {"evaluations": change(trial["evaluations"])} for trial in table["trials"]],
    }


def only(table: Table, holds: Callable[[dict[str, Any]], bool]) -> Table:
    """Return a table of those trials of which this holds."""
    return table | {"trials": [trial for trial in table["trials"] if holds(trial["config"])]}


def half(table: Table, number: int) -> Table:
    """Return the trials at even places (0) or at odd ones (1)."""
    return table | {"trials": table["trials"][number::2]}


ALTERED: Final[dict[str, Callable[[Table], Table]]] = {
    "as it is": lambda table: table,
    "first half": lambda table: half(table, 0),
    "second half": lambda table: half(table, 1),
    "range halved": lambda table: powered(table, 0.5),
    "range a fifth": lambda table: powered(table, 0.2),
    "range a twentieth": lambda table: powered(table, 0.05),
    "losses plus 2": lambda table: raised(table, 2.0),
    "10 evaluations": lambda table: every(table, 2),
    "5 evaluations": lambda table: every(table, 4),
    "4 evaluations": lambda table: every(table, 5),
    "noise 0.5%": lambda table: noisier(table, 0.005),
    "noise 1%": lambda table: noisier(table, 0.01),
    "range a fifth, noise 0.5%": lambda table: noisier(powered(table, 0.2), 0.005),
    "range halved, 10 evaluations": lambda table: every(powered(table, 0.5), 2),
    "constant rates": lambda table: only(table, lambda config: "constant" in config["training.schedule"]),
    "rates above 5e-4": lambda table: only(table, lambda config: config["training.learning_rate"] > 5e-4),
    "rates below 1e-3": lambda table: only(table, lambda config: config["training.learning_rate"] < 1e-3),
}
