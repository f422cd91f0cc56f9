"""A base with a new adapter on it: PEFT adapts a base once, a trial gets a shell of that and draws its own weights."""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from orchestrator.base import shell
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import LoraSection

_ADAPTER = "default"
"""PEFT's name of it."""

_patterns: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""Of each base, by the layers that are adapted."""


def lora_config(config: TrialConfig) -> LoraConfig:
    """PEFT's configuration of a trial's adapter."""
    lora = config.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias=lora.bias,
        task_type="CAUSAL_LM",
        revision=config.base.revision,
    )


def pattern(base: Any, config: TrialConfig) -> Any:
    """A `PeftModel` over a base's weights with an adapter of rank 1 on the layers of this trial.

    It is made once for each choice of layers: `get_peft_model` takes nine times as long as a shell of what it made
    (peft 0.21, `LoraModel._create_and_replace` and `_replace_module`, for each layer).

    Args:
        base: bare; it stays as it is.
        config: the trial, which trains no biases.
    """
    targets, made = config.lora.target_modules, _patterns.setdefault(base, {})
    key = targets if isinstance(targets, str) else tuple(targets)
    if key not in made:
        small = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 1})})
        made[key] = get_peft_model(shell(base), lora_config(small))
    return made[key]


def adapted(base: Any, config: TrialConfig) -> Any:
    """A `PeftModel` for one trial, as `get_peft_model` makes it, but for its weights, which `draw` lays.

    Args:
        base: bare; it stays as it is.
        config: the trial, which trains no biases.
    """
    model, lora = shell(pattern(base, config)), config.lora
    known = model.peft_config[_ADAPTER]
    known.r, known.lora_alpha, known.lora_dropout = lora.rank, lora.alpha, lora.dropout
    for layer in _layers(model):
        _fit(layer, lora)
    return model


def _fit(layer: Any, lora: LoraSection) -> None:
    """What `LoraLayer.update_layer` sets (peft 0.21, `tuners/lora/layer.py`)."""
    layer.r[_ADAPTER] = lora.rank
    layer.lora_alpha[_ADAPTER] = lora.alpha
    layer.scaling[_ADAPTER] = lora.alpha / lora.rank
    layer.lora_dropout[_ADAPTER] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
    first, second = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    first.out_features = second.in_features = lora.rank
    first.weight, second.weight = (nn.Parameter(torch.empty(0)) for _ in range(2))


def draw(model: Any, seed: int, dtype: torch.dtype) -> None:
    """Lay an adapter's first weights: A uniform within 1 / sqrt(in_features), as PEFT and `nn.Linear` have it; B zero.

    With a generator of its own: PEFT takes the process's, which trials beside this one share, and draws three times
    as many numbers as it uses. Then trl rounds them to bfloat16 (1.16, `SFTTrainer.__init__`). On the base's device: at
    rank 64 a host takes a second for what a GPU draws in milliseconds. So a GPU's are others than a CPU's.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    for layer in _layers(model):
        first, second = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        own = layer.weight.device  # a base may lie on several GPUs
        most = 1 / math.sqrt(first.in_features)
        drawn = torch.empty(first.out_features, first.in_features, device=device)
        first.weight.data = drawn.uniform_(-most, most, generator=generator).to(own, dtype)
        second.weight.data = torch.zeros(second.out_features, second.in_features, dtype=dtype, device=own)


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
