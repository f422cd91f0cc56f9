"""Colors and text of figures, readable on light and on dark backgrounds."""

import html
import math
from collections.abc import Sequence
from typing import Any, Final

from orchestrator.analysis.wording import say_short

BLUE: Final = "#3b82c4"
ORANGE: Final = "#d9822b"
GREEN: Final = "#2f9e6b"
RED: Final = "#d64550"
PURPLE: Final = "#8f63c9"
GRAY: Final = "#8a9099"

LEADERS: Final = (BLUE, ORANGE, GREEN, PURPLE, "#c4a000", "#2aa5b8", "#c25b9c", "#7a8f3c")
"""Colors of the best trials, in order."""

STATE_COLORS: Final = {
    "COMPLETE": GREEN,
    "STOPPED": ORANGE,
    "FAILED": RED,
    "RUNNING": BLUE,
    "PAUSED": PURPLE,
    "CANCELLED": GRAY,
    "PENDING": GRAY,
}
SCALE: Final = ((0.0, BLUE), (0.35, GREEN), (0.7, "#c4a000"), (1.0, RED))
"""Color scale from the best value to the worst."""


def plain(text: Any) -> str:
    """Return text for a figure: Plotly reads some HTML in names, so marks of HTML are escaped."""
    return html.escape(str(text), quote=False)


_LEAST_TICKS: Final = 4
_MOST_GAPS: Final = 6


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return ticks of a logarithmic axis between two positive numbers: their decimal logarithms, and their text.

    They are at 1, 2 and 5; where fewer than four of these lie between the numbers, at numbers of two digits, apart
    enough to be read.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))

    def between(factors: Sequence[float]) -> list[float]:
        ticks = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]

    inside = between((1,) if last - first > 3 else (1, 2, 5))
    if len(inside) < _LEAST_TICKS and low < high:
        ratio, inside = (high / low) ** (1 / _MOST_GAPS), []
        for tick in between([tenth / 10 for tenth in range(10, 100)]):
            if not inside or tick >= inside[-1] * ratio:
                inside.append(tick)
    inside = inside or [low, high]
    return [math.log10(tick) for tick in inside], [say_short(float(f"{tick:.4g}")) for tick in inside]


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return the settings of a logarithmic axis over these positive numbers, with ticks in plain numbers: four or more,
    unless the numbers are very close."""
    ticks, texts = log_ticks(min(values), max(values))
    return {"type": "log", "tickvals": [10**tick for tick in ticks], "ticktext": texts}
