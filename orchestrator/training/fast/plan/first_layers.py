"""A whole base of the first decoder layers of a base in pieces, with an engine on it, to compare with transformers."""

from typing import Any

import torch

from orchestrator.base import share_modules
from orchestrator.training.fast.families.settings import layer_kinds
from orchestrator.training.fast.families.text_model import text_model
from orchestrator.training.fast.shard.base import Stored, whole_layers
from orchestrator.training.fast.step.engine import Engine

LEAST = 2
"""Layers at least: the residual stream between two layers is compared too."""


def first_layers(base: Any, engine: Engine) -> tuple[Any, Engine]:
    """Build a base of the first layers, at least one of each kind, and an engine like the given one on it.

    Args:
        base: a base in pieces.
        engine: on that base.
    """
    text = text_model(base)
    kinds = layer_kinds(text.config)
    count = min(len(kinds), max(LEAST, *(1 + kinds.index(kind) for kind in kinds)))
    weights = whole_layers(base, count)
    short = share_modules(base)
    short_text = text_model(short)
    short_text.module.layers = torch.nn.ModuleList(list(short_text.module.layers)[:count])
    short_text.config.num_hidden_layers = count
    if getattr(short_text.config, "layer_types", None) is not None:
        short_text.config.layer_types = list(short_text.config.layer_types)[:count]
    for layer, found in zip(short_text.module.layers, weights, strict=True):
        for name, weight in found.items():
            _fill(layer.get_submodule(name), weight)
    return short, engine.with_one_slot_on(short)


def _fill(linear: Any, weight: Stored) -> None:
    """Give a linear layer a weight of its own in place of the empty one that it shares."""
    data, state = weight
    if state is None:
        linear.weight = torch.nn.Parameter(data, requires_grad=False)
        return
    from bitsandbytes.nn import Params4bit

    settings = {"blocksize": state.blocksize, "compress_statistics": state.nested, "quant_type": state.quant_type}
    linear.weight = Params4bit(
        data, requires_grad=False, quant_state=state, bnb_quantized=True, module=linear, **settings
    )
    linear.quant_state = state
