"""A base with a new adapter on it: PEFT adapts a base once, a trial gets a shell of that and draws its own weights."""

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from orchestrator.base import share_modules
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import LoraSection
from orchestrator.training.model.targets import TrainableBeside, expected_modules

ADAPTER = "default"
"""PEFT's name of it."""

_patterns: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""Of each base, by the layers that are adapted."""


def lora_config(config: TrialConfig, modules: Collection[str], beside: TrainableBeside | None = None) -> LoraConfig:
    """PEFT's configuration of a trial's adapter.

    Its first weights are ours to lay (`first_weights`): what it says of them is for who reads it later.

    Args:
        config: the trial.
        modules: names of the layers that it adapts, from `expected_modules`.
        beside: what else trains, from `expected_beside`; None where that is nothing.
    """
    lora, targets = config.lora, config.lora.target_modules
    if lora.layers_to_transform is not None and targets == "all-linear":  # PEFT takes only names with it
        targets = sorted({name.rpartition(".")[2] for name in modules})
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias=lora.bias,
        # Whole names: PEFT takes a part of one for any that ends with it (0.21: `norm` for `input_layernorm`).
        modules_to_save=sorted(beside.saved) if beside and beside.saved else None,
        trainable_token_indices=dict(beside.tokens) if beside and beside.tokens else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        task_type="CAUSAL_LM",
        revision=config.base.revision,
    )


def adapted_by_peft(base: Any, config: TrialConfig, modules: Collection[str], beside: TrainableBeside) -> Any:
    """A `PeftModel` for one trial of any kind. The other arguments are those of `lora_config`.

    Args:
        base: bare; it stays as it is.
    """
    own = share_modules(base, own_biases=config.lora.bias != "none")
    return get_peft_model(own, lora_config(config, modules, beside))


def peft_template(base: Any, config: TrialConfig) -> Any:
    """A `PeftModel` over a base's weights with an adapter of rank 1 on the layers of this trial.

    It is made once for each choice of layers: `get_peft_model` takes nine times as long as a shell of what it made
    (peft 0.21, `LoraModel._create_and_replace` and `_replace_module`, for each layer).

    Args:
        base: bare; it stays as it is.
        config: a trial that the fast engine holds.
    """
    lora, made = config.lora, _patterns.setdefault(base, {})
    key = repr((lora.target_modules, lora.layers_to_transform))
    if key not in made:
        small = config.model_copy(update={"lora": lora.model_copy(update={"rank": 1})})
        made[key] = get_peft_model(share_modules(base), lora_config(small, expected_modules(base, lora)))
    return made[key]


def adapted(base: Any, config: TrialConfig) -> Any:
    """A `PeftModel` for one trial, as `get_peft_model` makes it, but for its weights, which `draw` lays.

    Args:
        base: bare; it stays as it is.
        config: a trial that the fast engine holds.
    """
    model, lora = share_modules(peft_template(base, config)), config.lora
    known, wanted = model.peft_config[ADAPTER], lora_config(config, ())
    known.r, known.lora_alpha, known.lora_dropout = lora.rank, lora.alpha, lora.dropout
    known.use_rslora, known.init_lora_weights = wanted.use_rslora, wanted.init_lora_weights
    for layer in lora_layers(model).values():
        _fit(layer, lora)
    return model


def _fit(layer: Any, lora: LoraSection) -> None:
    """What `LoraLayer.update_layer` sets (peft 0.21, `tuners/lora/layer.py`)."""
    layer.r[ADAPTER] = lora.rank
    layer.lora_alpha[ADAPTER] = lora.alpha
    layer.use_rslora[ADAPTER] = lora.rslora
    layer.scaling[ADAPTER] = lora.scale(lora.rank, lora.alpha)
    layer.lora_dropout[ADAPTER] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
    first, second = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    first.out_features = second.in_features = lora.rank
    first.weight, second.weight = (nn.Parameter(torch.empty(0)) for _ in range(2))


def lora_layers(model: Any) -> dict[str, Any]:
    """The adapted layers of a `PeftModel`, by their names in the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def load_adapter_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Put an adapter's saved weights into the model that it was trained in.

    Args:
        model: a `PeftModel`.
        weights: by the names of PEFT's file; from `Adapter.less` the trained half is taken, the model lacks the other.
    """
    own = {}
    for name, layer in lora_layers(model).items():
        rank, prefix = layer.r[ADAPTER], f"base_model.model.{name}"
        own[f"{prefix}.lora_A.weight"] = weights[f"{prefix}.lora_A.weight"][:rank]
        own[f"{prefix}.lora_B.weight"] = weights[f"{prefix}.lora_B.weight"][:, :rank]
    set_peft_model_state_dict(model, {**weights, **own})
