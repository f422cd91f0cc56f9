"""Results of earlier sweeps beside those of this one: `sweep --warm-from`."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from orchestrator.record.models import PriorSweep
from orchestrator.sweep.search.coordinates import Coordinate
from orchestrator.sweep.search.space import Point

WEIGHT: Final = 0.5
"""Share of a difference between earlier trials that is expected between the same points here. It is the correlation of
results on different data, if these vary equally. The number is a guess, not measured."""
NUM_FIRST: Final = 3
"""Earlier points that searchers without a prior try first."""


def comparable(sweeps: Sequence[PriorSweep], mode: str, best: float) -> list[tuple[Point, float]]:
    """Return earlier points with the results that are expected of them here; lower is better.

    Losses on other data have another level, so each sweep's best trial is put at the best own result. Positive results
    differ by their ratio, others by their difference.

    Args:
        sweeps: earlier sweeps.
        mode: which end of the metric is better.
        best: best own result, where lower is better; infinite if there is none, and levels stay as they were.
    """
    found = []
    for sweep in sweeps:
        values = [trial.value if mode == "min" else -trial.value for trial in sweep.trials]
        lowest = min(values)
        level = best if math.isfinite(best) else lowest
        for trial, value in zip(sweep.trials, values, strict=True):
            if lowest > 0 and level > 0:
                expected = level * (value / lowest) ** WEIGHT
            else:
                expected = level + WEIGHT * (value - lowest)
            found.append((trial.point, expected))
    return found


def not_replaced(
    earlier: Sequence[tuple[Point, float]], own: Sequence[Point], coordinates: Mapping[str, Coordinate]
) -> list[tuple[Point, float]]:
    """Return the earlier results that still count: each own result takes the place of the nearest earlier one.

    So earlier results count less with each own one, and not at all once there are as many own ones.
    """
    left = list(earlier)
    for point in own[: len(earlier)]:
        left.remove(min(left, key=lambda result: _distance(result[0], point, coordinates)))
    return left


def _distance(one: Point, other: Point, coordinates: Mapping[str, Coordinate]) -> float:
    """Return the sum of the distances along all axes, each from 0 to 1; a field of one point alone counts as 1."""
    return sum(
        each.distance(one[path], other[path]) if path in one and path in other else float(path in one or path in other)
        for path, each in coordinates.items()
    )


def first_points(sweeps: Sequence[PriorSweep], mode: str) -> list[Point]:
    """Return the best earlier points: the best of each sweep, then the second best of each, and so on."""
    sign = 1 if mode == "min" else -1
    ranked = [sorted(sweep.trials, key=lambda trial: sign * trial.value) for sweep in sweeps]
    points: list[Point] = []
    for place in range(max(map(len, ranked), default=0)):
        for trials in ranked:
            if place < len(trials) and trials[place].point not in points:
                points.append(trials[place].point)
    return points[:NUM_FIRST]
