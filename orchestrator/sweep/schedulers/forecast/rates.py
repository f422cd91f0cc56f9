"""Learning rates of all steps of a trial, by its own schedule.

The driver imports no torch, and transformers' schedule functions need it. These are the same functions of the step; a
test compares each with transformers' own (5.23, `optimization.py`).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from orchestrator.spec.sections import TrainingSection

_INVERSE_SQRT_TIMESCALE = 10_000
"""Time scale of schedule inverse_sqrt without warmup, in steps (transformers 5.23)."""

Shape = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Factor of the rate after the warmup, by the share of the steps after it that are done (0 to 1)."""


def learning_rates(training: TrainingSection, steps: int) -> NDArray[np.float64]:
    """Return the learning rate of each optimizer step, of shape (steps,).

    Args:
        training: the trial's own section.
        steps: optimizer steps of the whole trial.

    Raises:
        KeyError: the schedule's shape is not known here.
    """
    warmup = _warmup_steps(training, steps)
    at = np.arange(steps, dtype=np.float64)
    if training.schedule == "warmup_stable_decay":
        factors = _stable_then_decay(training, at, warmup, steps)
    elif training.schedule == "inverse_sqrt":
        scale = warmup or _INVERSE_SQRT_TIMESCALE
        factors = np.where(at < warmup, at / max(1, warmup), np.sqrt(scale / (np.maximum(at, warmup) + scale - warmup)))
    else:
        done = (np.maximum(at, warmup) - warmup) / max(1, steps - warmup)
        factors = np.where(at < warmup, at / max(1, warmup), _shape(training)(done))
    return training.learning_rate * factors


def _warmup_steps(training: TrainingSection, steps: int) -> int:
    if training.schedule == "constant":
        return 0
    return int(training.warmup) if training.warmup >= 1 else math.ceil(training.warmup * steps)


def _shape(training: TrainingSection) -> Shape:
    least = training.final_rate
    shapes: dict[str, Shape] = {
        "constant": np.ones_like,
        "constant_with_warmup": np.ones_like,
        "linear": lambda done: 1 - done,
        "cosine": _half_cosine,
        "cosine_with_restarts": lambda done: _half_cosine(training.cycles * done % 1.0),
        "cosine_with_min_lr": lambda done: least + (1 - least) * _half_cosine(done),
        "polynomial": lambda done: least + (1 - least) * (1 - done),
    }
    return shapes[training.schedule]


def _half_cosine(done: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.cos(np.pi * done))


def _stable_then_decay(
    training: TrainingSection, at: NDArray[np.float64], warmup: int, steps: int
) -> NDArray[np.float64]:
    """Return the factors of schedule warmup_stable_decay, which also begins at its final rate."""
    least, length = training.final_rate, training.decay_steps or 1
    begin = steps - length
    rising = least + (1 - least) * at / max(1, warmup)
    falling = least + (1 - least) * _half_cosine(np.clip((at - begin) / length, 0, 1))
    return np.where(at < warmup, rising, np.where(at < begin, 1.0, falling))
