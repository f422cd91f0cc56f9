"""The effect of each searched field on the outcome: an additive model with intervals and a permutation test.

The logarithm of the loss (or the metric itself, if it is another one) is modeled as a sum of one curve for each field:
a parabola over a range or over listed numbers, one value for each other listed value. Coefficients have a normal
prior around zero, in proportion to the noise (Bayesian linear regression with a normal-inverse-gamma prior; Gelman et
al., Bayesian Data Analysis, 3rd edition, chapter 14). So few trials give small effects with wide intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.analysis.outcomes import Outcome
from orchestrator.deploy.recommend import CONFIDENCE
from orchestrator.spec.axes import Axis

Array = NDArray[np.float64]

PRIOR_PRECISION: Final = 0.3
"""Precision of a coefficient's prior, in units of the noise: worth this many trials at the end of a range."""
PERMUTATIONS: Final = 999
GRID: Final = 21
"""Values of a range at which a curve is looked at."""


@dataclass(frozen=True)
class Effect:
    """What changing one field alone does, from the worst value tried to that of the leader."""

    better: Any
    """Value of the leader, or the value that the model finds best if the leader does not have the field."""
    worse: Any
    """Value that the model finds worst among those tried."""
    change: float
    """Change of the modeled outcome, from `worse` to `better`: of the log loss, or of the metric."""
    low: float
    high: float
    """Bounds of the central `CONFIDENCE` interval of the change."""
    p_value: float
    """Share of random permutations with a curve as large: how easily chance alone explains the field."""


@dataclass(frozen=True)
class Coordinate:
    """How a field enters the model."""

    axis: Axis
    values: list[Any]
    """Listed values in the order of the coordinate; empty for a range."""

    @property
    def is_category(self) -> bool:
        """Whether the values have no order."""
        return bool(self.values) and not all(_is_number(value) for value in self.values)

    def at(self, value: Any) -> float:
        """Return the coordinate of a value: its place in the list, or -1 to 1 over the range."""
        if self.values:
            place = next((i for i, each in enumerate(self.values) if repr(each) == repr(value)), 0)
            return float(place) if self.is_category or len(self.values) == 1 else 2 * place / (len(self.values) - 1) - 1
        low, high = self._ends()
        number = math.log(value) if self.is_log else float(value)
        return 2 * (number - low) / (high - low) - 1

    def value(self, coordinate: float) -> Any:
        """Return the value at a coordinate of a range."""
        low, high = self._ends()
        number = low + (coordinate + 1) / 2 * (high - low)
        return self.axis.nearest(math.exp(number) if self.is_log else number)

    @property
    def is_log(self) -> bool:
        """Whether a range is logarithmic."""
        return "log" in self.axis.kind

    def basis(self, coordinates: Array) -> Array:
        """Return the factors of the field's coefficients, (n, coefficients)."""
        if self.is_category:
            found: Array = np.eye(len(self.values))[coordinates.astype(int)]
            return found
        columns = [coordinates] if len(self.values) == 2 else [coordinates, coordinates**2]
        return np.stack(columns, axis=1)

    def _ends(self) -> tuple[float, float]:
        low, high = (float(value) for value in self.axis.probes())
        return (math.log(low), math.log(high)) if self.is_log else (low, high)


def coordinate_of(axis: Axis) -> Coordinate:
    """Return how an axis enters the model."""
    if not axis.is_discrete:
        return Coordinate(axis, [])
    is_ordered = all(_is_number(value) for value in axis.values)
    return Coordinate(axis, sorted(axis.values) if is_ordered else list(axis.values))


def find_effects(
    axes: dict[str, Axis], outcomes: Sequence[Outcome], is_log: bool, is_lower_better: bool, leader: dict[str, Any]
) -> dict[str, Effect]:
    """Return the effect of each field that has two or more values among the trials.

    Args:
        axes: searched fields.
        outcomes: trials with their outcomes.
        is_log: whether the logarithm of the outcome is modeled.
        is_lower_better: which end of the outcome is better.
        leader: the leader's values.
    """
    model = _Model(axes, outcomes, is_log)
    return {name: model.effect(name, is_lower_better, leader.get(name, _ABSENT)) for name in model.blocks}


class _Model:
    """The fitted additive model."""

    def __init__(self, axes: dict[str, Axis], outcomes: Sequence[Outcome], is_log: bool) -> None:
        y = np.array([math.log(each.value) if is_log else each.value for each in outcomes])
        self.blocks: dict[str, slice] = {}
        self._coordinates = {name: coordinate_of(axis) for name, axis in axes.items()}
        self._tried: dict[str, Array] = {}
        columns: list[Array] = []
        self._means: list[Array] = []
        for name, coordinate in self._coordinates.items():
            given = [each.trial.config.varied.get(name, _ABSENT) for each in outcomes]
            exists = np.array([value is not _ABSENT for value in given])
            tried = np.array([coordinate.at(value) for value in given if value is not _ABSENT])
            if len(np.unique(tried)) < 2:
                continue
            basis = coordinate.basis(tried)
            mean = basis.mean(axis=0)
            block = np.zeros((len(outcomes), basis.shape[1]))
            block[exists] = basis - mean  # a trial without the field has the mean of its curve
            start = sum(each.shape[1] for each in columns)
            self.blocks[name] = slice(start, start + block.shape[1])
            self._tried[name] = np.sort(tried)
            columns.append(block)
        self._x = np.concatenate(columns, axis=1) if columns else np.zeros((len(outcomes), 0))
        self._weights = np.ones(len(outcomes))
        self._fit(y)
        sd = np.array([each.log_sd for each in outcomes]) if is_log else np.zeros(len(outcomes))
        if sd.any():
            self._weights = self._variance / (self._variance + sd**2)
            self._fit(y)
        self._y = y

    def _whitened(self, keep: NDArray[np.bool_] | None = None) -> tuple[Array, Array]:
        """Return root weights, and the centered, weighted design (of the kept columns)."""
        root = np.sqrt(self._weights)
        x = self._x if keep is None else self._x[:, keep]
        center = (self._weights[:, None] * x).sum(axis=0) / self._weights.sum()
        return root, (x - center) * root[:, None]

    def _fit(self, y: Array) -> None:
        root, x = self._whitened()
        target = (y - np.average(y, weights=self._weights)) * root
        precision = x.T @ x + PRIOR_PRECISION * np.eye(x.shape[1])
        self._spread = np.linalg.inv(precision)
        self._mean = self._spread @ x.T @ target
        misfit = float(target @ target - self._mean @ precision @ self._mean)
        self._freedom = max(len(y) - 1, 1)
        self._variance = max(misfit / self._freedom, 1e-12)

    def effect(self, name: str, is_lower_better: bool, chosen: Any) -> Effect:
        """Return the effect of a field between the worst of the values that were tried and the chosen one."""
        block, coordinate = self.blocks[name], self._coordinates[name]
        grid, labels = self._grid(name)
        basis = coordinate.basis(grid)
        curve = basis @ self._mean[block]
        costs = curve if is_lower_better else -curve
        worst = int(costs.argmax())
        if chosen is _ABSENT:
            better, at_better = labels[int(costs.argmin())], basis[int(costs.argmin())]
        else:
            better, at_better = chosen, coordinate.basis(np.array([coordinate.at(chosen)]))[0]
        contrast = at_better - basis[worst]
        change = float(contrast @ self._mean[block])
        scale = math.sqrt(self._variance * float(contrast @ self._spread[block, block] @ contrast))
        num = int(np.linalg.matrix_rank(basis - basis.mean(axis=0)))
        # Scheffe's method: the two values were chosen because their difference is the largest.
        half = math.sqrt(num * _f_quantile(num, self._freedom)) * scale
        p_value = self._p_value(name, basis, float(np.ptp(curve)))
        return Effect(better, labels[worst], change, change - half, change + half, p_value)

    def _grid(self, name: str) -> tuple[Array, list[Any]]:
        """Return coordinates within what was tried, and the values there."""
        coordinate, tried = self._coordinates[name], self._tried[name]
        if coordinate.values:
            grid = np.unique(tried)
            at = {round(coordinate.at(value), 9): value for value in coordinate.values}
            return grid, [at[round(float(each), 9)] for each in grid]
        grid = np.linspace(tried[0], tried[-1], GRID)
        return grid, [coordinate.value(float(each)) for each in grid]

    def _p_value(self, name: str, basis: Array, observed: float) -> float:
        """Return the share of permutations in which the field's curve is as large as the observed one.

        Residuals of the model without the field are permuted (Freedman and Lane, 1983), enlarged by what the fit of
        that model has taken from them.
        """
        block = self.blocks[name]
        keep = np.ones(self._x.shape[1], dtype=bool)
        keep[block] = False
        root, x = self._whitened()
        _, others = self._whitened(keep)
        target = (self._y - np.average(self._y, weights=self._weights)) * root
        hat = others @ np.linalg.solve(others.T @ others + PRIOR_PRECISION * np.eye(others.shape[1]), others.T)
        fitted, num = hat @ target, len(target)
        enlarged = (target - fitted) * math.sqrt((num - 1) / max(num - 1 - float(np.trace(hat)), 1.0))
        residual = np.random.default_rng(0).permuted(np.tile(enlarged, (PERMUTATIONS, 1)), axis=1)
        coefficients = self._spread @ x.T @ (fitted[:, None] + residual.T)
        curves = basis @ coefficients[block]
        return float((1 + (np.ptp(curves, axis=0) >= observed - 1e-12).sum()) / (1 + PERMUTATIONS))


_ABSENT: Final = object()


def _f_quantile(above: int, below: int) -> float:
    """Return the `CONFIDENCE` quantile of the F distribution with these degrees of freedom, from draws."""
    return float(np.quantile(np.random.default_rng(0).f(above, below, 200_000), CONFIDENCE))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
