"""The check that ends a trial whose loss or gradient norm is not a finite number."""

import math
from collections.abc import Mapping

from orchestrator.errors import DivergedError


def require_finite(metrics: Mapping[str, float], step: int) -> None:
    """Check the metrics of a step.

    Args:
        metrics: values by name.
        step: the step that they belong to, for the message.

    Raises:
        DivergedError: names the first metric that is NaN or infinite.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DivergedError(f"{name} is {value} at step {step}", "Try a lower learning rate, or another precision.")
