"""The positions of a base: how long its rows may be, and where a row's result depends on the rows beside it.

The functions take a configuration or a model of transformers, and import no library unless they get one.
"""

from typing import Any

_NO_TABLE = ("mpt",)
"""Model types that fail on rows beyond their limit without a table of positions: MPT's ALiBi has a fixed length."""

_NAMES_IN_FILES = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names of the limit in files of configurations, Llama's, GPT-2's and MPT's."""

_MOST_SPARE_ROWS = 4
"""Rows that a table of positions may have beyond the limit; OPT and BART use two for padding."""


def position_limit(config: Any) -> int | None:
    """Return the number of positions that a base was made for, RoPE scaling included; None if it states no limit.

    Where a configuration scales its positions, the limit is the largest number that can be meant. Some configurations
    state the length before scaling in `max_position_embeddings` (linear, dynamic, Qwen2.5 with YaRN), others the
    length after it (Llama 3.1, Phi-3).
    """
    text = config.get_text_config()
    stated = _stated(text)
    if stated is None:
        return None
    scaled = [_original(rope, stated) * (rope.get("factor") or 1) for rope in _ropes(text)]
    return int(max(stated, *scaled)) if scaled else stated


def limit_in_file(document: dict[str, Any]) -> int | None:
    """Return the limit that a config.json states, without RoPE scaling; None if it states none.

    Args:
        document: what the file holds; {} without a file.
    """
    parts = (document.get("text_config"), document)
    found = [part[name] for part in parts if isinstance(part, dict) for name in _NAMES_IN_FILES if part.get(name)]
    return found[0] if found and isinstance(found[0], int) and found[0] > 0 else None


def independent_length(config: Any) -> int | None:
    """Return how many tokens a row may have before its frequencies depend on the longest row of its batch.

    Dynamic NTK computes the frequencies of RoPE from the longest row of a batch, and longrope chooses between two sets
    of them (transformers 5.23, `modeling_rope_utils.py`, `dynamic_rope_update`). Up to this length both do nothing.

    Returns:
        A number of tokens, or None if the frequencies never depend on a batch.
    """
    text = config.get_text_config()
    stated = _stated(text)
    if stated is None:
        return None
    lengths = [stated for rope in _ropes(text) if "dynamic" in rope["rope_type"]]
    lengths += [_original(rope, stated) for rope in _ropes(text) if rope["rope_type"] == "longrope"]
    return min(lengths, default=None)


def rows_per_pass(config: Any, batch_size: int, longest: int | None) -> int:
    """Return how many rows a forward pass of an evaluation may hold: 1 if rows would change each other's results.

    Args:
        config: configuration of the base.
        batch_size: rows to hold otherwise.
        longest: tokens of the longest row, with its answer if one is generated; None if it is not known.
    """
    length = independent_length(config)
    return batch_size if length is None or (longest is not None and longest <= length) else 1


def fails_beyond_limit(model: Any) -> bool:
    """Tell whether a base fails on rows longer than its limit, because it looks positions up in a table.

    Other bases compute their positions and accept rows of any length.
    """
    import torch

    text = model.config.get_text_config()
    limit = _stated(text)
    if limit is None:
        return False
    if text.model_type in _NO_TABLE:
        return True
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    if any(limit <= table.num_embeddings <= limit + _MOST_SPARE_ROWS for table in tables):
        return True
    # CodeGen, GPT-J and CTRL have a buffer (positions, features). That of XGLM, which grows, has two rows more.
    return any(buffer.dim() == 2 and buffer.shape[0] == limit for buffer in model.buffers())


def forget_earlier_batches(model: Any) -> None:
    """Have Dynamic NTK compute the frequencies of a batch from that batch alone.

    transformers (5.23) keeps the frequencies of the longest batch so far, until a batch is below the limit. A result
    would depend on the order of batches, and a resumed trial would differ from an uninterrupted one.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if any(isinstance(each, str) and "dynamic" in each for each in kinds):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, _: Any) -> None:
    """Reset a rotary embedding as `dynamic_rope_update` does after a short batch."""
    kinds = module.rope_type
    for prefix in [f"{layer_type}_" for layer_type in kinds] if isinstance(kinds, dict) else [""]:
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if original is not None:
            setattr(module, f"{prefix}inv_freq", original)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _stated(text: Any) -> int | None:
    """Return the limit in a configuration; None if it has none. XLNet states -1."""
    stated = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def _ropes(text: Any) -> list[dict[str, Any]]:
    """Return the parameters of RoPE that have an effect; some bases have one set for each type of layer."""
    given = getattr(text, "rope_parameters", None) or {}
    sets = [given, *given.values()]
    return [each for each in sets if isinstance(each, dict) and each.get("rope_type", "default") != "default"]


def _original(rope: dict[str, Any], stated: int) -> int:
    """Return the length before scaling."""
    return rope.get("original_max_position_embeddings") or stated
