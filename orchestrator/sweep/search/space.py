"""Definitions that all search algorithms share: points, their encoding, and the value of a failed trial."""

import math
from typing import Any

from orchestrator.spec.search import SearchSection

Point = dict[str, Any]
"""Dotted field -> value, for the fields that exist at the point."""


def by_depth(search: SearchSection) -> list[str]:
    """Sort the fields so that each follows the fields that decide whether it exists."""
    return sorted(search.space, key=lambda path: len(search.ancestors(path)))


def encode(search: SearchSection, point: Point) -> dict[str, Any]:
    """Convert a point to what a searcher would have drawn for it."""
    return {path: search.space[path].encode(value) for path, value in point.items()}


def worst_value(mode: str) -> float:
    """Return the value that is reported for a trial that failed by its own values.

    It is infinite, and so worse than any measured value. TPE, CMA-ES and BOHB only compare the values
    of trials; a finite value could turn out to be better than that of a later trial that did not fail.
    """
    return math.inf if mode == "min" else -math.inf
