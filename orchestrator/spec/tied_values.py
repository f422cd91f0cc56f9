"""Tied fields: values that follow from others by arithmetic, such as `lora.alpha: 2 * lora.rank`."""

import ast
import operator
from collections.abc import Callable
from typing import Any

_MAX_LENGTH = 200


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


def evaluate_tied(expression: str, lookup: Callable[[str], Any]) -> Any:
    """Evaluate an arithmetic expression over dotted fields, which are read through `lookup`.

    Allows + - * / // **, parentheses, min, max and round. Nothing else is executed.

    Raises:
        ValueError: the expression contains anything else, or its arithmetic fails.
    """

    if len(expression) > _MAX_LENGTH:
        raise ValueError(f"is longer than {_MAX_LENGTH} characters")

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
                return lookup(_dotted(node))
        raise ValueError(f"cannot use {ast.unparse(node)!r}; allowed: numbers, fields, + - * / // **, min, max, round")

    try:
        return value_of(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"is not arithmetic: {error.msg}") from error
    except (ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be computed: {error}") from error


def _dotted(node: ast.expr) -> str:
    """Return a dotted field as it was written; `ast.unparse` of each would take most of the time of a check."""
    match node:
        case ast.Attribute(value=parent, attr=name):
            return f"{_dotted(parent)}.{name}"
        case ast.Name(id=name):
            return name
    return ast.unparse(node)
