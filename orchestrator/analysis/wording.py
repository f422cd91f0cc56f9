"""Numbers in sentences."""

from math import exp
from typing import Any

from orchestrator.analysis.effects import Effect
from orchestrator.report.tables import number


def say_number(value: Any) -> str:
    """Return a value in a few characters: floats with four digits, large whole numbers with commas."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def say_short(value: Any) -> str:
    """Return a searched value as the tables show it, with three digits."""
    return number(value)


def say_share(share: float) -> str:
    """Return a share in percent, such as `12%`; `under 1%` if it rounds to less."""
    return "under 1%" if 0 < share < 0.01 else f"{share:.0%}"


def say_change(change: float, is_log: bool) -> str:
    """Return a change of the metric with its sign: in percent if it is one of the logarithm."""
    return f"{100 * (exp(change) - 1):+.3g}%" if is_log else f"{change:+.3g}"


def say_effect(effect: Effect, metric: str, is_log: bool) -> str:
    """Return what a field does, with its interval."""
    change, low, high = (say_change(each, is_log) for each in (effect.change, effect.low, effect.high))
    return (
        f"{say_short(effect.better)} instead of {say_short(effect.worse)} changes {metric} by {change} "
        f"(95% interval {low} to {high})"
    )


def listed(items: list[str], most: int = 6) -> str:
    """Return items with commas and `and`; beyond `most`, how many more there are."""
    if len(items) > most:
        return f"{', '.join(items[:most])} and {len(items) - most} more"
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"
