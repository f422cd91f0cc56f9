"""Stop tokens of a model and of a bundle: the ids at which an answer is over.

A bundle keeps them in `generation_config.json`, a loaded model in its `generation_config`: so `generate` stops there,
whoever calls it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import RecordError

GENERATION = "generation_config.json"
"""File of a bundle, in transformers' form."""


def stop_ids(value: Any) -> list[int]:
    """Ids in a configuration's `eos_token_id`, which may be None, one id, or a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [int(value)]


def as_eos(stops: Sequence[int]) -> int | list[int] | None:
    """Ids as a configuration's `eos_token_id`: one alone, for readers that know no lists, else a list."""
    if not stops:
        return None
    return stops[0] if len(stops) == 1 else list(stops)


def joined(*parts: Iterable[int]) -> list[int]:
    """Ids of all parts in their order, each once."""
    return list(dict.fromkeys(token for part in parts for token in part))


def stops_of(model: Any) -> list[int]:
    """Ids at which a model's `generate` stops."""
    return stop_ids(model.generation_config.eos_token_id)


def stop_at(model: Any, stops: Sequence[int]) -> None:
    """Have a model's `generate` stop at these ids and no others."""
    model.generation_config.eos_token_id = as_eos(stops)


def write_stops(folder: Path, stops: Sequence[int], tokenizer: Any) -> None:
    """Write stop tokens into a folder's `generation_config.json`; what else is in it stays."""
    path = folder / GENERATION
    document = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
    # Not by transformers: it refuses to write files such as Llama 2's, which name a temperature for greedy answers.
    text = json.dumps(document | {"eos_token_id": as_eos(stops)}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def read_stops(folder: Path) -> list[int]:
    """Ids that a folder's `generation_config.json` stops at; none where there is no such file.

    Raises:
        RecordError: the file is damaged.
    """
    path = folder / GENERATION
    if not path.is_file():
        return []
    try:
        return stop_ids(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    except (ValueError, TypeError, AttributeError) as error:  # no JSON, no object, no ids
        raise RecordError(f"{path}: is damaged: {error}") from error
