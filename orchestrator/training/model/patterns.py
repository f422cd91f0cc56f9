"""Ranks and alphas of single layers: `lora.rank_pattern` and `lora.alpha_pattern`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.spec.sections import LoraSection


def layer_ranks(lora: LoraSection, names: Iterable[str]) -> dict[str, int]:
    """Return the rank of each of these adapted layers, by its name."""
    return {name: _pattern_value(name, lora.rank_pattern, lora.rank) for name in names}


def layer_alphas(lora: LoraSection, names: Iterable[str]) -> dict[str, float]:
    """Return the alpha of each of these adapted layers, by its name."""
    return {name: _pattern_value(name, lora.alpha_pattern, lora.alpha) for name in names}


def largest_rank(lora: LoraSection, names: Iterable[str]) -> int:
    """Return the largest rank of these adapted layers; without layers, `lora.rank`."""
    return max(layer_ranks(lora, names).values(), default=lora.rank)


def matches_pattern(name: str, pattern: str) -> bool:
    """Return whether a pattern matches this layer, by PEFT's rule (0.21, `utils/other.py`, `get_pattern_key`)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _pattern_value(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first pattern that matches this layer."""
    return next((value for pattern, value in patterns.items() if matches_pattern(name, pattern)), default)
