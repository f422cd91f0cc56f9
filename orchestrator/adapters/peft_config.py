"""The PEFT configuration of an adapter folder, which may come from somebody else."""

from pathlib import Path
from typing import Any

from orchestrator.documents import DocumentError, read_json
from orchestrator.errors import RecordError

CONFIG = "adapter_config.json"


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Return the configuration.

    Raises:
        RecordError: it is damaged.
    """
    path = folder / CONFIG
    try:
        found = read_json(path)
    except DocumentError as error:
        raise RecordError(f"{path}: is damaged: it {error}") from error
    if not isinstance(found, dict):
        raise RecordError(f"{path}: is damaged: the document is not a JSON object")
    return found


def largest_rank(folder: Path) -> int:
    """Return the largest rank of an adapter's modules.

    Raises:
        RecordError: the configuration is damaged.
    """
    config = read_peft_config(folder)
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise RecordError(f"{folder / CONFIG}: is damaged: a rank (r, rank_pattern) is not a positive number")
    largest: int = max(ranks)
    return largest
