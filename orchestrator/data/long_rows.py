"""Rows that are longer than the base has positions: found before anything is trained."""

from orchestrator.base import configuration
from orchestrator.base_folder import config_document
from orchestrator.positions import limit_in_file, position_limit
from orchestrator.spec.sections import BaseSection, DataSection

REMEDY = "Lower data.max_length to that number."

NOT_READ = "A base with learned positions cannot read such rows at all"


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
    stated = None if base.trust_remote_code else limit_in_file(config_document(base))
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
