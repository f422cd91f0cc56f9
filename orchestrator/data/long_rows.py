"""Rows that are longer than the base has positions: found before anything is trained."""

import json
from collections.abc import Sequence
from typing import Any

from orchestrator.base import configuration
from orchestrator.base_folder import config_file
from orchestrator.positions import position_limit
from orchestrator.spec.sections import BaseSection, DataSection

REMEDY = "Lower data.max_length to that number."

NOT_READ = "A base with learned positions cannot read such rows at all"

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names of the limit in files of configurations, Llama's, GPT-2's and MPT's."""


def load_position_limit(base: BaseSection) -> int | None:
    """Return the number of positions that a base was made for (`positions.position_limit`); None if it is not known."""
    try:
        return position_limit(configuration(base))
    except (OSError, ValueError):  # reported where the base is loaded
        return None


def note_on_max_length(data: DataSection, base: BaseSection) -> str | None:
    """Return a note if `data.max_length` allows rows beyond the base's positions; None also if they are not known.

    Reads the base's config.json only, unless its limit is exceeded. RoPE scaling may then raise the limit. A base with
    its own code is left out: that code is not run to check an experiment.
    """
    file = None if base.trust_remote_code else config_file(base)
    try:
        stated = _stated_limit(json.loads(file.read_text(encoding="utf-8"))) if file else None
    except (OSError, ValueError):
        return None
    if stated is None or data.max_length <= stated:
        return None
    limit = load_position_limit(base)
    if limit is None or data.max_length <= limit:
        return None
    return (
        f"data.max_length={data.max_length}: base {base.model} has {limit} positions, and was not trained beyond them. "
        f"{NOT_READ}. {REMEDY}"
    )


def describe_long_rows(num_long: int, num_rows: int, longest: int, limit: int, model: str) -> str:
    """Return a sentence about rows beyond the base's positions.

    Args:
        num_long: how many there are.
        num_rows: number of all rows.
        longest: tokens of the longest.
        limit: positions of the base.
        model: name of the base.
    """
    verb = "has" if num_long == 1 else "have"
    return (
        f"{num_long} of {num_rows} rows {verb} more tokens (up to {longest}) than base {model} has positions ({limit})"
    )


def _stated_limit(config: dict[str, Any]) -> int | None:
    parts: Sequence[Any] = (config.get("text_config"), config)
    found = [part[name] for part in parts if isinstance(part, dict) for name in _LIMITS if part.get(name)]
    return found[0] if found and isinstance(found[0], int) and found[0] > 0 else None
