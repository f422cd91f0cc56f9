"""Coordinates of the axes of a space: each value as a number from 0 to 1, or as one of several categories."""

import math
import random
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator.spec.axes import Axis

SPREAD = 0.25
"""Standard deviation of draws around a value, as a share of the axis (PriorBand, arXiv 2306.12370, section 5)."""


@dataclass(frozen=True)
class Coordinate:
    """One axis as a model sees it. Listed numbers are places in ascending order; other listed values have no order."""

    axis: Axis
    ordered: tuple[Any, ...] | None
    """Listed values in ascending order; None for a range, and for values that are not all numbers."""

    @classmethod
    def of(cls, axis: Axis) -> "Coordinate":
        """Return the coordinate of an axis."""
        if not axis.is_discrete:
            return cls(axis, None)
        is_ordered = all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)
        return cls(axis, tuple(sorted(axis.values)) if is_ordered else None)

    @property
    def is_category(self) -> bool:
        """Whether the values have no order."""
        return self.axis.is_discrete and self.ordered is None

    def distribution(self) -> BaseDistribution:
        """Return what an Optuna sampler draws from."""
        if self.is_category:
            return CategoricalDistribution([*range(len(self.axis.values))])
        if self.ordered is not None:
            return IntDistribution(0, len(self.ordered) - 1)
        return FloatDistribution(0.0, 1.0)

    def encode(self, value: Any) -> Any:
        """Return what an Optuna sampler would have drawn for a value of the axis."""
        if self.is_category:
            return self.axis.encode(value)
        return self.ordered.index(value) if self.ordered is not None else self._share(value)

    def decode(self, drawn: Any) -> Any:
        """Return the value for what an Optuna sampler has drawn."""
        if self.is_category:
            return self.axis.values[drawn]
        return self.ordered[drawn] if self.ordered is not None else self._at(drawn)

    def nearest(self, number: float) -> Any:
        """Return the value nearest to a number: by its logarithm, if all values are positive."""
        if self.ordered is None:
            return self.axis.nearest(number)
        by_ratio = number > 0 and self.ordered[0] > 0
        return min(self.ordered, key=lambda value: abs(math.log(value / number)) if by_ratio else abs(value - number))

    def largest(self) -> Any:
        """Return the largest value."""
        return self.ordered[-1] if self.ordered is not None else self.axis.probes()[-1]

    def middle(self) -> Any:
        """Return the value in the middle; the first one, if the values have no order."""
        if self.is_category:
            return self.axis.values[0]
        return self.ordered[(len(self.ordered) - 1) // 2] if self.ordered is not None else self._at(0.5)

    def distance(self, one: Any, other: Any) -> float:
        """Return how far two values are from each other, from 0 to 1; values without an order are 0 or 1 apart."""
        if self.is_category:
            return float(one != other)
        if self.ordered is not None:
            return abs(self.ordered.index(one) - self.ordered.index(other)) / max(1, len(self.ordered) - 1)
        return abs(self._share(one) - self._share(other))

    def draw(self, generator: random.Random) -> Any:
        """Draw a value, each as likely as the others."""
        if self.axis.is_discrete:
            return generator.choice(self.axis.values)
        return self._at(generator.random())

    def draw_around(self, center: Any, generator: random.Random) -> Any:
        """Draw a value around another one: normally distributed, within the axis.

        Of values without an order, the center is drawn in half of the cases.
        """
        if self.is_category:
            return center if generator.random() < 0.5 else self.draw(generator)
        if self.ordered is not None:
            last = len(self.ordered) - 1
            return self.ordered[round(_normal_within(self.ordered.index(center), SPREAD * last, last, generator))]
        return self._at(_normal_within(self._share(center), SPREAD, 1.0, generator))

    def _share(self, value: float) -> float:
        low, high = self._ends()
        return min(max((self._scaled(value) - low) / (high - low), 0.0), 1.0)

    def _at(self, share: float) -> Any:
        low, high = self._ends()
        number = low + share * (high - low)
        return self.axis.nearest(math.exp(number) if self._is_log else number)

    def _ends(self) -> tuple[float, float]:
        low, high = self.axis.probes()
        return self._scaled(low), self._scaled(high)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self._is_log else float(value)

    @property
    def _is_log(self) -> bool:
        return "log" in self.axis.kind


def _normal_within(mean: float, spread: float, high: float, generator: random.Random) -> float:
    """Draw from a normal distribution that is cut off at 0 and at `high`."""
    while True:
        drawn = generator.gauss(mean, spread)
        if 0 <= drawn <= high:
            return drawn
