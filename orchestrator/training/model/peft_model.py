"""Build the `PeftModel` of a trial. PEFT adapts a base once; each trial gets a copy that shares the base's weights."""

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from orchestrator.adapters.expert_updates import AdaptedExperts, apply_by_expert, expert_layers
from orchestrator.base import share_modules
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import LoraSection
from orchestrator.training.model.patterns import layer_alphas, layer_ranks
from orchestrator.training.model.targets import ExtraTrainables, expected_experts, expected_modules

ADAPTER = "default"
"""The name that PEFT gives the adapter."""

_templates: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""Base -> the fields that choose the adapted layers -> the template model."""


def lora_config(config: TrialConfig, modules: Collection[str], extra: ExtraTrainables | None = None) -> LoraConfig:
    """Return PEFT's configuration of a trial's adapter.

    `adapter_init` sets the first weights. What the configuration says of them is only for later readers of the file.

    Args:
        config: the trial.
        modules: names of the layers that it adapts, from `expected_modules`.
        extra: what else trains, from `expected_extra_trainables`; None if nothing does.
    """
    lora = config.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # Whole names: PEFT's own all-linear would add fused experts and routers, and a last part such as `q_proj` the
        # layers of a vision tower. From 20 names on, PEFT shortens them to the parts that are enough (0.21).
        target_modules=sorted(modules),
        target_parameters=sorted(extra.experts) if extra and extra.experts else None,
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias=lora.bias,
        # Full names: PEFT would also match `norm` with `input_layernorm`, because that ends with it (0.21).
        modules_to_save=sorted(extra.saved) if extra and extra.saved else None,
        trainable_token_indices=dict(extra.tokens) if extra and extra.tokens else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        task_type="CAUSAL_LM",
        revision=config.base.revision,
    )


def model_from_peft(base: Any, config: TrialConfig, modules: Collection[str], extra: ExtraTrainables) -> Any:
    """Build a `PeftModel` for a trial of any kind with PEFT itself.

    Args:
        base: the bare base; it is not changed.
        config, modules, extra: see `lora_config`.
    """
    own = share_modules(base, own_biases=config.lora.bias != "none")
    model = get_peft_model(own, lora_config(config, modules, extra))
    apply_by_expert(model)
    return model


def peft_template(base: Any, config: TrialConfig) -> Any:
    """Return a `PeftModel` that shares the base's weights and has an adapter of rank 1 on the layers of this trial.

    One template is built for each choice of layers. `get_peft_model` takes nine times as long as a copy of its result
    (peft 0.21 runs `LoraModel._create_and_replace` and `_replace_module` for each layer).

    Args:
        base: the bare base; it is not changed.
        config: a trial that the fast engine supports.
    """
    lora, templates = config.lora, _templates.setdefault(base, {})
    key = repr((lora.target_modules, lora.layers_to_transform))
    if key not in templates:
        plain = lora.model_copy(update={"rank": 1, "rank_pattern": {}, "alpha_pattern": {}})
        small = config.model_copy(update={"lora": plain})
        extra = ExtraTrainables({}, 0, {}, 0, expected_experts(base, lora))
        templates[key] = model_from_peft(base, small, expected_modules(base, lora), extra)
    return templates[key]


def model_from_template(base: Any, config: TrialConfig) -> Any:
    """Build a `PeftModel` for one trial from the template.

    It equals the result of `get_peft_model`, except that its LoRA matrices are empty until `init_adapter` sets them.

    Args:
        base: the bare base; it is not changed.
        config: a trial that the fast engine supports.
    """
    model, lora = share_modules(peft_template(base, config)), config.lora
    known, wanted = model.peft_config[ADAPTER], lora_config(config, ())
    known.r, known.lora_alpha, known.lora_dropout = lora.rank, lora.alpha, lora.dropout
    known.rank_pattern, known.alpha_pattern = wanted.rank_pattern, wanted.alpha_pattern
    known.use_rslora, known.init_lora_weights = wanted.use_rslora, wanted.init_lora_weights
    parts = adapted_parts(model)
    ranks, alphas = layer_ranks(lora, parts), layer_alphas(lora, parts)
    for name, layer in parts.items():
        _resize(layer, lora, ranks[name], alphas[name])
    return model


def _resize(layer: Any, lora: LoraSection, rank: int, alpha: float) -> None:
    """Set what `LoraLayer.update_layer` and `ParamWrapper.update_layer` set (peft 0.21, `tuners/lora/layer.py`)."""
    layer.r[ADAPTER] = rank
    layer.lora_alpha[ADAPTER] = alpha
    layer.use_rslora[ADAPTER] = lora.rslora
    layer.scaling[ADAPTER] = lora.scale(rank, alpha)
    layer.lora_dropout[ADAPTER] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
    lora_a, lora_b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    count = layer.num_experts if isinstance(layer, AdaptedExperts) else 1
    lora_a.out_features = lora_b.in_features = rank * count
    lora_a.weight, lora_b.weight = (nn.Parameter(torch.empty(0)) for _ in range(2))


def lora_layers(model: Any) -> dict[str, Any]:
    """Return the adapted linear layers of a `PeftModel`, by their names in the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, AdaptedExperts)
    }


def adapted_parts(model: Any) -> dict[str, Any]:
    """Return the adapted linear layers and parameters of experts of a `PeftModel`, by their names in the base."""
    return lora_layers(model) | expert_layers(model)


def load_adapter_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy an adapter's saved weights into the model in which it was trained.

    An adapter from `Adapter.less` has twice the rank: the trained half, and the first update, which the model's base
    layers subtract already. Only the trained half is loaded.

    Args:
        model: a `PeftModel`.
        weights: the tensors by the names of PEFT's file.
    """
    own = {}
    for name, layer in lora_layers(model).items():
        rank, prefix = layer.r[ADAPTER], f"base_model.model.{name}"
        own[f"{prefix}.lora_A.weight"] = weights[f"{prefix}.lora_A.weight"][:rank]
        own[f"{prefix}.lora_B.weight"] = weights[f"{prefix}.lora_B.weight"][:, :rank]
    set_peft_model_state_dict(model, {**weights, **own})
