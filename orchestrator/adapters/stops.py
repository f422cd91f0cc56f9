"""Stop tokens of a model and of a bundle: the token ids that end an answer.

A bundle stores them in `generation_config.json`, a loaded model in its `generation_config`. transformers' `generate`
reads them from there, so that every caller stops at the same tokens.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.documents import read_json
from orchestrator.errors import RecordError

GENERATION = "generation_config.json"
"""A bundle's file with stop tokens, in transformers' format."""


def stop_ids(value: Any) -> list[int]:
    """Return the ids in a configuration's `eos_token_id`, which may be None, one id, or a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [int(value)]


def as_eos(stops: Sequence[int]) -> int | list[int] | None:
    """Return ids as a value for `eos_token_id`: a single id as an int (some readers accept no list), else a list."""
    if not stops:
        return None
    return stops[0] if len(stops) == 1 else list(stops)


def unique_ids(*parts: Iterable[int]) -> list[int]:
    """Concatenate ids in their order, without duplicates."""
    return list(dict.fromkeys(token for part in parts for token in part))


def stops_of(model: Any) -> list[int]:
    """Return the ids at which a model's `generate` stops."""
    return stop_ids(model.generation_config.eos_token_id)


def stop_at(model: Any, stops: Sequence[int]) -> None:
    """Make a model's `generate` stop at these ids and no others."""
    model.generation_config.eos_token_id = as_eos(stops)


def write_stops(folder: Path, stops: Sequence[int], tokenizer: Any) -> None:
    """Write stop tokens into a folder's `generation_config.json`, and leave its other fields as they are."""
    path = folder / GENERATION
    document = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if path.is_file():
        document = read_json(path)
    # transformers refuses to save some published files, such as Llama 2's: they set a temperature for greedy decoding.
    text = json.dumps(document | {"eos_token_id": as_eos(stops)}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def read_stops(folder: Path) -> list[int]:
    """Read the stop tokens from a folder's `generation_config.json`; an empty list if there is no such file.

    Raises:
        RecordError: the file is damaged.
    """
    path = folder / GENERATION
    if not path.is_file():
        return []
    try:
        return stop_ids(read_json(path).get("eos_token_id"))
    except (ValueError, TypeError, AttributeError) as error:  # not JSON, not an object, or not ids
        raise RecordError(f"{path}: is damaged: {error}") from error
