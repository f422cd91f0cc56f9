"""How the trials of a sweep are spread over workers. Imports neither Ray nor an ML library."""

import math
from typing import Literal

from orchestrator.spec import SweepSpec


def max_concurrent_trials(spec: SweepSpec) -> int:
    """Return the number of trials that may run at a time."""
    return min(spec.search.total_trials, spec.resources.max_concurrent or spec.search.total_trials)


def spread(max_concurrent: int, requested: int | Literal["auto"], capacity: int) -> tuple[int, int]:
    """Return the number of workers, and of trials at a time in each, which is at most `requested`.

    Args:
        max_concurrent: trials at a time in all workers.
        requested: `resources.trials_per_gpu`.
        capacity: workers that the machines can hold.
    """
    num_workers = min(capacity, max_concurrent if requested == "auto" else math.ceil(max_concurrent / requested))
    slots = math.ceil(max_concurrent / num_workers)
    return num_workers, slots if requested == "auto" else min(requested, slots)
