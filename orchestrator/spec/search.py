"""The search section: a space over dotted fields, and values tied to them by arithmetic."""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from orchestrator.spec.sections import PositiveInt, Section

AxisKind = Literal["choice", "grid", "uniform", "loguniform", "randint"]
AXIS_KINDS: tuple[AxisKind, ...] = ("choice", "grid", "uniform", "loguniform", "randint")


class Axis(Section):
    """One searched field, written `{kind: values}`: `{choice: [8, 16]}`, `{loguniform: [1e-5, 1e-3]}`."""

    kind: AxisKind
    values: Annotated[list[Any], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _from_single_key(cls, written: Any) -> Any:
        if not isinstance(written, dict) or len(written) != 1 or next(iter(written)) not in AXIS_KINDS:
            raise ValueError(
                f"must be one of {', '.join(f'{{{kind}: [...]}}' for kind in AXIS_KINDS)}, got {written!r}"
            )
        ((kind, values),) = written.items()
        if not isinstance(values, list):
            raise ValueError(f"{kind} takes a list, got {values!r}")
        return {"kind": kind, "values": values}

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.is_discrete:
            if len({repr(value) for value in self.values}) != len(self.values):
                raise ValueError(f"{self.kind} holds a value twice: {self.values}")
            return self
        wanted = int if self.kind == "randint" else (int, float)
        if len(self.values) != 2 or not all(isinstance(v, wanted) and not isinstance(v, bool) for v in self.values):
            kind = "whole numbers" if self.kind == "randint" else "numbers"
            raise ValueError(f"{self.kind} takes two {kind}, [low, high], got {self.values}")
        low, high = self.values
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"{self.kind} takes finite numbers, got {self.values}")
        if low >= high:
            raise ValueError(f"must hold low < high, but got (low={low}, high={high})")
        if self.kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform must hold low > 0, but got low={low}")
        return self

    @model_serializer
    def _to_single_key(self) -> dict[str, list[Any]]:
        return {self.kind: self.values}

    @property
    def is_discrete(self) -> bool:
        """Whether the values are listed one by one."""
        return self.kind in ("choice", "grid")

    def probes(self) -> list[Any]:
        """Values whose validity stands for the whole axis: all listed ones, or both ends (randint: high excluded)."""
        if self.kind == "randint":
            return [self.values[0], self.values[1] - 1]
        return self.values


class SearchSection(Section):
    """Which trials there are, and which of them is best."""

    algorithm: Literal["grid", "random", "optuna"] = "random"
    """Every combination, independent draws, or optuna's TPE."""
    num_trials: PositiveInt | None = None
    """Trials of random and optuna (default 10); a grid has its own number."""
    space: dict[str, Axis] = {}
    """Dotted field -> axis, such as `training.learning_rate: {loguniform: [1e-5, 1e-3]}`."""
    tied: dict[str, str] = {}
    """Dotted field -> arithmetic over other fields, such as `lora.alpha: 2 * lora.rank`."""
    metric: str = "eval/loss"
    """What trials are compared by, each at its best evaluation."""
    mode: Literal["min", "max"] | None = None
    """Which end is better; default min for eval/loss, max for the others."""
    seed: int = 0
    """Seed of the searcher."""

    @model_validator(mode="after")
    def _algorithm_fits_axes(self) -> Self:
        kinds = {path: axis.kind for path, axis in self.space.items()}
        if self.algorithm == "grid":
            if self.num_trials is not None:
                raise ValueError("num_trials is the number of combinations for algorithm grid; leave it out")
            if open_axes := [path for path, axis in self.space.items() if not axis.is_discrete]:
                raise ValueError(f"algorithm grid needs listed values, but {open_axes[0]} is {kinds[open_axes[0]]}")
        elif grids := [path for path, kind in kinds.items() if kind == "grid"]:
            raise ValueError(f"{grids[0]} is a grid axis, but algorithm is {self.algorithm}; use choice")
        if both := sorted(set(self.space) & set(self.tied)):
            raise ValueError(f"{both[0]} is both searched and tied")
        return self

    @property
    def total_trials(self) -> int:
        """Number of trials the sweep will have; one where nothing is searched."""
        if not self.space:
            return 1
        if self.algorithm != "grid":
            return self.num_trials or 10
        total = 1
        for axis in self.space.values():
            total *= len(axis.values)
        return total

    @property
    def resolved_mode(self) -> Literal["min", "max"]:
        """Which end of the metric is better."""
        return self.mode or ("min" if self.metric == "eval/loss" else "max")


_LONGEST_TIE = 200


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > 64:
        raise ArithmeticError(f"exponent {exponent} is larger than 64")
    return operator.pow(base, exponent)


_OPERATORS: dict[type[ast.operator | ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round}


def evaluate_tie(expression: str, lookup: Callable[[str], Any]) -> Any:
    """Value of an arithmetic expression over dotted fields, read through `lookup`.

    Knows + - * / // **, parentheses, min, max and round. Nothing else is run.

    Raises:
        ValueError: the expression holds anything else, or its arithmetic fails.
    """

    if len(expression) > _LONGEST_TIE:
        raise ValueError(f"is longer than {_LONGEST_TIE} characters")

    def value_of(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value_of(left), value_of(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value_of(operand))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(value_of, arguments))
            case ast.Attribute():
                return lookup(ast.unparse(node))
        raise ValueError(f"cannot use {ast.unparse(node)!r}; allowed: numbers, fields, + - * / // **, min, max, round")

    try:
        return value_of(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"is not arithmetic: {error.msg}") from error
    except (ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be computed: {error}") from error


def read_path(document: Mapping[str, Any], path: str) -> Any:
    """Value at a dotted path of nested mappings; KeyError where there is none."""
    value: Any = document
    for key in path.split("."):
        value = value[key]
    return value


def write_keys(document: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the value at a path of keys, making the mappings on the way (also in the place of nothing)."""
    *parents, leaf = keys
    for key in parents:
        if document.get(key) is None:
            document[key] = {}
        document = document[key]
    document[leaf] = value
