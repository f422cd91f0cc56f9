"""A figure that is not finite ends its trial."""

import math
from collections.abc import Mapping

from orchestrator.errors import DivergedError


def require_finite(figures: Mapping[str, float], step: int) -> None:
    """Check the figures of a step.

    Raises:
        DivergedError: names the first figure that is NaN or infinite.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DivergedError(f"{name} is {value} at step {step}", "Try a lower learning rate, or another precision.")
