"""Axes of a search space: the values that one field may have, and the condition under which it is searched."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, assert_never, get_args

from pydantic import Field, model_serializer, model_validator

from orchestrator.spec.sections import Section

AxisKind = Literal[
    "choice",
    "grid",
    "uniform",
    "loguniform",
    "quniform",
    "qloguniform",
    "randint",
    "lograndint",
    "qrandint",
    "qlograndint",
]
AXIS_KINDS: tuple[AxisKind, ...] = get_args(AxisKind)
WHOLE_KINDS = tuple(kind for kind in AXIS_KINDS if kind.endswith("randint"))
"""Kinds that are ranges of whole numbers."""


@dataclass(frozen=True)
class IndexDomain:
    """A searcher draws the index of a listed value, from 0."""

    count: int


@dataclass(frozen=True)
class IntDomain:
    """A searcher draws a whole number; both ends are included."""

    low: int
    high: int
    is_log: bool


@dataclass(frozen=True)
class FloatDomain:
    """A searcher draws a real number."""

    low: float
    high: float
    is_log: bool


class Axis(Section):
    """One searched field, written `{kind: values}`: `{choice: [8, 16]}`, `{loguniform: [1e-5, 1e-3]}`.

    Ranges are [low, high]; randint and lograndint exclude high. Kinds that begin with q are [low, high, step], with the
    values low, low + step, ... up to high.
    """

    kind: AxisKind
    values: Annotated[list[Any], Field(min_length=1)]
    when: dict[str, list[Any]] | None = None
    """Another searched field, and those of its values with which this field exists. Otherwise it keeps the file's
    value."""

    @model_validator(mode="before")
    @classmethod
    def _from_single_key(cls, written: Any) -> Any:
        kinds = [key for key in written if key != "when"] if isinstance(written, dict) else []
        if len(kinds) != 1 or kinds[0] not in AXIS_KINDS:
            raise ValueError(
                f"must be one of {', '.join(f'{{{kind}: [...]}}' for kind in AXIS_KINDS)}, got {written!r}"
            )
        (kind,) = kinds
        if not isinstance(written[kind], list):
            raise ValueError(f"{kind} takes a list, got {written[kind]!r}")
        when = written.get("when")
        if "when" in written:
            if not isinstance(when, dict) or len(when) != 1:
                raise ValueError(f"when takes one searched field and its values, {{field: [values]}}, got {when!r}")
            ((parent, values),) = when.items()
            when = {parent: values if isinstance(values, list) else [values]}
        return {"kind": kind, "values": written[kind], "when": when}

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.is_discrete:
            if len({repr(value) for value in self.values}) != len(self.values):
                raise ValueError(f"{self.kind} contains a value twice: {self.values}")
            return self
        self._is_a_range_of_numbers()
        low, high = self.values[:2]
        if low >= high:
            raise ValueError(f"must hold low < high, but got (low={low}, high={high})")
        if self.is_whole and not self.is_stepped and high - low == 1:
            raise ValueError(f"{self.kind} leaves high out: {self.values} contains only {low}; use choice")
        if "log" in self.kind and low <= 0:
            raise ValueError(f"{self.kind} must hold low > 0, but got low={low}")
        if self.is_stepped and not 0 < self.values[2] <= high - low:
            raise ValueError(f"{self.kind} must hold 0 < step <= high - low, but got {self.values}")
        return self

    def _is_a_range_of_numbers(self) -> None:
        wanted = int if self.is_whole else (int, float)
        count, names = ("three", "[low, high, step]") if self.is_stepped else ("two", "[low, high]")
        of_wanted_type = all(isinstance(v, wanted) and not isinstance(v, bool) for v in self.values)
        if len(self.values) != 2 + self.is_stepped or not of_wanted_type:
            numbers = "whole numbers" if self.is_whole else "numbers"
            raise ValueError(f"{self.kind} takes {count} {numbers}, {names}, got {self.values}")
        if not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"{self.kind} takes finite numbers, got {self.values}")

    @model_serializer
    def _to_single_key(self) -> dict[str, Any]:
        return {self.kind: self.values} | ({"when": self.when} if self.when else {})

    @property
    def is_discrete(self) -> bool:
        """Whether the values are listed one by one."""
        return self.kind in ("choice", "grid")

    @property
    def is_stepped(self) -> bool:
        """Whether the values are a fixed step apart."""
        return self.kind.startswith("q")

    @property
    def is_whole(self) -> bool:
        """Whether this is a range of whole numbers."""
        return self.kind in WHOLE_KINDS

    @property
    def parent(self) -> str | None:
        """The field on which the existence of this one depends."""
        return next(iter(self.when)) if self.when else None

    def listed(self) -> list[Any] | None:
        """Return all values in order, if they can be listed."""
        if self.is_discrete:
            return self.values
        return [self._step(i) for i in range(self._num_steps + 1)] if self.is_stepped else None

    def all_values(self) -> Sequence[Any] | None:
        """Return all values in order, or None for a range of real numbers."""
        if self.is_whole and not self.is_stepped:
            return range(*self.values)
        return self.listed()

    def probes(self) -> list[Any]:
        """Return values that represent the whole axis in checks: all listed ones, or both ends of a range.

        They have the type that is drawn.
        """
        if self.is_discrete:
            return self.values
        if self.is_stepped:
            return [self._step(0), self._step(self._num_steps)]
        low, high = self.values
        return [low, high - 1] if self.is_whole else [float(low), float(high)]

    def domain(self) -> IndexDomain | IntDomain | FloatDomain:
        """Return what a searcher draws from, for `decode`. For a range with steps these are reals, rounded later."""
        low, high = self.probes()[0], self.probes()[-1]
        is_log = "log" in self.kind
        match self.kind:
            case "choice" | "grid":
                return IndexDomain(len(self.values))
            case "uniform" | "loguniform":
                return FloatDomain(low, high, is_log)
            case "randint" | "lograndint":
                return IntDomain(low, high, is_log)
            case "quniform" | "qloguniform" | "qrandint" | "qlograndint":
                # Half a step more at each end; otherwise the ends would be drawn half as often.
                half = self.values[2] / 2
                return FloatDomain(low - half if low > half or not is_log else low, high + half, is_log)
            case unknown:
                assert_never(unknown)

    def draw(self, generator: random.Random) -> Any:
        """Draw at random, for `decode`."""
        drawn = self.domain()
        if isinstance(drawn, IndexDomain):
            return generator.randrange(drawn.count)
        low, high = (math.log(drawn.low), math.log(drawn.high)) if drawn.is_log else (drawn.low, drawn.high)
        number = generator.uniform(low, high)
        return self.nearest(math.exp(number) if drawn.is_log else number)

    def decode(self, drawn: Any) -> Any:
        """Return the field's value for what a searcher has drawn."""
        if self.is_discrete:
            return self.values[drawn]
        if self.is_stepped:
            return self.nearest(drawn)
        return int(drawn) if self.is_whole else float(drawn)

    def encode(self, value: Any) -> Any:
        """Return what a searcher would have drawn for a value of the field."""
        return _index(self.values, value) if self.is_discrete else value

    def nearest(self, number: float) -> Any:
        """Return the value of a range that is nearest to a number."""
        low, high = self.probes()
        if self.is_stepped:
            return self._step(min(max(round((number - low) / self.values[2]), 0), self._num_steps))
        return min(max(round(number) if self.is_whole else number, low), high)

    def holds(self, value: Any) -> bool:
        """Whether a value is on the axis."""
        if self.is_discrete:
            return _index(self.values, value) is not None
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            return False
        return bool(math.isclose(self.nearest(value), value, rel_tol=1e-9, abs_tol=1e-12))

    @property
    def _num_steps(self) -> int:
        low, high, step = self.values
        return int((high - low) / step + 1e-9)

    def _step(self, index: int) -> Any:
        low, _, step = self.values
        value = low + index * step
        return value if self.is_whole else float(f"{value:.12g}")


def _index(values: list[Any], wanted: Any) -> int | None:
    """Return the index of a value, or None; True and 1 are different values."""
    return next((i for i, value in enumerate(values) if repr(value) == repr(wanted)), None)
