"""Derive from a configuration what should train on its base, and the values that the live model must then have."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from orchestrator.base import new_token_ids
from orchestrator.base_weights import is_packed
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import LoraSection
from orchestrator.training.model.linear_layers import ExpertShapes, LayerShapes, LinearLayers, linear_layers
from orchestrator.training.model.patterns import layer_alphas, layer_ranks, matches_pattern

_LIVE_OPTIMIZERS = {
    "adamw_torch": "torch.AdamW",
    "adamw_torch_fused": "torch.AdamW fused",
    "adamw_8bit": "bitsandbytes.AdamW 8-bit",
    "paged_adamw_32bit": "bitsandbytes.AdamW 32-bit paged",
    "paged_adamw_8bit": "bitsandbytes.AdamW 8-bit paged",
    "ademamix": "bitsandbytes.AdEMAMix 32-bit",
    "ademamix_8bit": "bitsandbytes.AdEMAMix 8-bit",
    "paged_ademamix_32bit": "bitsandbytes.AdEMAMix 32-bit paged",
    "paged_ademamix_8bit": "bitsandbytes.AdEMAMix 8-bit paged",
    "lion_32bit": "bitsandbytes.Lion 32-bit",
    "lion_8bit": "bitsandbytes.Lion 8-bit",
    "paged_lion_32bit": "bitsandbytes.Lion 32-bit paged",
    "paged_lion_8bit": "bitsandbytes.Lion 8-bit paged",
    "rmsprop": "torch.RMSprop",
    "rmsprop_bnb_32bit": "bitsandbytes.RMSprop 32-bit",
    "rmsprop_bnb_8bit": "bitsandbytes.RMSprop 8-bit",
    "adagrad": "torch.Adagrad",
    "adafactor": "transformers.Adafactor",
    "sgd": "torch.SGD",
}
"""`training.optimizer` -> the live optimizer, as `readback.read_back` describes it."""


def expected_modules(model: Any, lora: LoraSection) -> LayerShapes:
    """Return the linear layers of a bare base that the adapter should adapt: name -> (in_features, out_features).

    Raises:
        TrialError: `target_modules`, `layers_to_transform` or a pattern names no layer of this base, or one that cannot
            be adapted.
    """
    layers = linear_layers(model)
    require_adaptable(layers, lora)
    saved = [name for name in layers.shapes if any(_is_inside(name, module) for module in lora.modules_to_save or ())]
    found = {name: layers.shapes[name] for name in _targeted(layers, lora) if name not in saved}
    experts = _targeted_experts(layers, lora)
    if lora.layers_to_transform is not None:
        numbers = {name: _layer_number(name) for name in (*found, *experts)}
        for number in lora.layers_to_transform:
            if number not in numbers.values():
                raise TrialError(
                    f"lora.layers_to_transform: there is no layer {number} to adapt; this base has "
                    f"{sorted({each for each in numbers.values() if each is not None})}"
                )
        found = {name: shape for name, shape in found.items() if numbers[name] in lora.layers_to_transform}
    if saved and not found and not experts:
        raise TrialError("lora.target_modules: nothing is left to adapt; all layers are in lora.modules_to_save")
    for pattern in ("rank_pattern", "alpha_pattern"):
        for each in getattr(lora, pattern):
            if not any(matches_pattern(name, each) for name in (*found, *experts)):
                one = next(iter((*found, *experts)))
                raise TrialError(f"lora.{pattern}: {each!r} matches no adapted layer; one is named {one}")
    return found


def expected_experts(model: Any, lora: LoraSection) -> ExpertShapes:
    """Return the parameters of fused experts that the adapter should adapt: name -> (num_experts, in, out features).

    Args:
        model: the bare base.
        lora: the configuration, checked by `expected_modules`.
    """
    return _adapted_experts(linear_layers(model), lora)


def adapted_names(model: Any, lora: LoraSection) -> set[str]:
    """Return the names of all linear layers and parameters of fused experts that the adapter should adapt.

    The arguments and the error are those of `expected_modules`.
    """
    return {*expected_modules(model, lora), *expected_experts(model, lora)}


def _adapted_experts(layers: LinearLayers, lora: LoraSection) -> ExpertShapes:
    experts, numbers = _targeted_experts(layers, lora), lora.layers_to_transform
    return {name: shape for name, shape in experts.items() if numbers is None or _layer_number(name) in numbers}


def _targeted_experts(layers: LinearLayers, lora: LoraSection) -> ExpertShapes:
    """Return the parameters of experts that `lora.target_modules` chooses."""
    if lora.target_modules == "all-linear":
        return {}
    targets = lora.target_modules
    return {n: shape for n, shape in layers.expert_shapes.items() if any(_names_expert(n, each) for each in targets)}


def _names_expert(name: str, target: str) -> bool:
    """Return whether a target is the name of the experts that hold this parameter, or of the parameter with them.

    `down_proj` alone names linear layers only, `experts.down_proj` the experts.
    """
    return ends_with(name.rpartition(".")[0], target) or ("." in target and ends_with(name, target))


def require_adaptable(layers: LinearLayers, lora: LoraSection) -> None:
    """Check that `lora.target_modules` names layers that can be adapted, and no experts that train in full.

    Args:
        layers: the linear layers of the base.
        lora: the configuration.

    Raises:
        TrialError: it does not; the remedy is a list that can be adapted.
    """
    remedy = f"Set lora.target_modules: [{', '.join(layers.adaptable_leaves)}]."
    if lora.target_modules == "all-linear":
        if refused := [name for name, why in layers.impossible.items() if why == "refused"]:
            raise TrialError(f"lora.target_modules: all-linear includes {layers.why_impossible(refused)}", remedy)
        return
    for target in lora.target_modules:
        named = [name for name in layers.shapes if ends_with(name, target)]
        if not named and any(_names_expert(name, target) for name in layers.expert_shapes):
            continue
        if any(ends_with(name, target) for name in layers.experts):
            raise TrialError(
                f"lora.target_modules: {target!r} names experts of a form that this version cannot adapt", remedy
            )
        if not named:
            leaves = sorted({name.rpartition(".")[2] for name in layers.shapes} | expert_leaves(layers.expert_shapes))
            close = get_close_matches(target.rpartition(".")[2], leaves, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TrialError(
                f"lora.target_modules: {target!r} names no layer of this base; it has {', '.join(leaves)}{hint}"
            )
        if impossible := [name for name in named if name in layers.impossible]:
            raise TrialError(f"lora.target_modules: {target!r} names {layers.why_impossible(impossible)}", remedy)
        if all(layers.left_out.get(name) == "unreached" for name in named):
            raise TrialError(f"lora.target_modules: {target!r} names only layers that text does not reach", remedy)
    _require_not_saved(_adapted_experts(layers, lora), lora)


def _require_not_saved(experts: ExpertShapes, lora: LoraSection) -> None:
    """Check that no adapted experts are inside a module that trains in full."""
    for module in lora.modules_to_save or ():
        if inside := expert_leaves(name for name in experts if _is_inside(name, module)):
            raise TrialError(
                f"lora.modules_to_save: {module} contains the adapted experts {', '.join(sorted(inside))}; adapt them "
                "or train them in full"
            )


def expert_leaves(names: Iterable[str]) -> set[str]:
    """Return the last two parts of the names of experts' parameters, such as `experts.down_proj`."""
    return {".".join(name.split(".")[-2:]) for name in names}


def _targeted(layers: LinearLayers, lora: LoraSection) -> list[str]:
    """Return the names of the layers that `lora.target_modules` chooses."""
    if lora.target_modules == "all-linear":
        return list(layers.adaptable)
    return [
        name
        for name in layers.shapes
        if any(ends_with(name, target) for target in lora.target_modules) and layers.left_out.get(name) != "unreached"
    ]


def target_warnings(model: Any, lora: LoraSection) -> list[str]:
    """Return warnings: of layers that could be meant but are not adapted, and of those that are better left out.

    Args:
        model: the bare base.
        lora: the configuration.
    """
    layers = linear_layers(model)
    if lora.target_modules == "all-linear":
        left_out = layers.say_left_out(list(layers.left_out), with_experts=True)
        return [left_out] if left_out else []
    named = [name for name in layers.left_out if any(ends_with(name, target) for target in lora.target_modules)]
    unreached = [name for name in named if layers.left_out[name] == "unreached"]
    said = (
        layers.say_left_out(unreached, with_experts=False),
        layers.say_taken([name for name in named if name not in unreached]),
    )
    return [each for each in said if each]


@dataclass(frozen=True)
class ExtraTrainables:
    """What trains on a base besides the adapters of its linear layers."""

    saved: dict[str, int]
    """Name of a module that trains in full (`lora.modules_to_save`) -> its number of parameters."""
    num_biases: int
    """Number of bias values that train."""
    tokens: dict[str, list[int]]
    """Name of the embedding, and of the head if it has its own weight -> ids of the tokens whose rows train."""
    width: int
    """Length of these rows."""
    experts: ExpertShapes = field(default_factory=dict)
    """Parameters of fused experts that are adapted."""

    @property
    def num_parameters(self) -> int:
        """Number of the parameters that train, without the adapters of experts."""
        rows = sum(len(ids) for ids in self.tokens.values())
        return sum(self.saved.values()) + self.num_biases + rows * self.width


def expected_extra_trainables(model: Any, config: TrialConfig, modules: LayerShapes, tokenizer: Any) -> ExtraTrainables:
    """Return what should train on a bare base besides the adapters of its linear layers.

    Args:
        model: the base.
        config: the trial.
        modules: from `expected_modules`.
        tokenizer: the base's tokenizer, with its new tokens.

    Raises:
        TrialError: this base has no such modules, or they cannot train in full.
    """
    from torch.nn import Embedding

    saved = _expected_saved_modules(model, config)
    ids = new_token_ids(config.base, tokenizer) if config.base.new_tokens else []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tokens, width = {}, 0
    if ids:
        assert isinstance(embedding, Embedding)
        names = {id(module): name for name, module in model.named_modules()}
        parts = [embedding] if head.weight is embedding.weight else [embedding, head]
        # A module that trains in full contains the rows of the new tokens.
        tokens = {names[id(part)]: ids for part in parts if names[id(part)] not in saved}
        width = embedding.embedding_dim
    num_biases = _num_trained_biases(model, config.lora, modules)
    return ExtraTrainables(saved, num_biases, tokens, width, expected_experts(model, config.lora))


def _expected_saved_modules(model: Any, config: TrialConfig) -> dict[str, int]:
    """Return the modules that should train in full, with their numbers of parameters."""
    asked = config.lora.modules_to_save or []
    every = dict(model.named_modules())
    found = {name: module for name, module in every.items() if any(ends_with(name, each) for each in asked)}
    for each in asked:
        if not any(ends_with(name, each) for name in every):
            leaves = sorted({name.rpartition(".")[2] for name in every} - {""} - {str(i) for i in range(1000)})
            raise TrialError(f"lora.modules_to_save: this base has no {each!r}; it has {', '.join(leaves)}")
    shared = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in found.items():
        if any(not each.is_floating_point() or is_packed(each) for each in module.parameters()):
            raise TrialError(
                f"lora.modules_to_save: {name} is stored as {config.base.quantization}, which cannot train in full",
                "Adapt it (lora.target_modules), or set base.quantization: none.",
            )
        if any(module is each for each in shared) and shared[0].weight is shared[1].weight:
            raise TrialError(
                f"lora.modules_to_save: {name} shares its weight between embedding and head in this base; training "
                "it would separate the two",
                "base.new_tokens trains single rows of it for both.",
            )
    return {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in found.items()}


def left_out_layers(model: Any, modules: Collection[str]) -> set[str]:
    """Return the layers that the files of a 4-bit or 8-bit base leave unquantized, as its configuration says.

    Args:
        model: the bare base.
        modules: names of layers.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    settings = getattr(model.config, "quantization_config", None)
    left_out = getattr(settings, "llm_int8_skip_modules", None) or []
    return {name for name in modules if not should_convert_module(name, left_out)}


def expected(
    config: TrialConfig, modules: LayerShapes, extra: ExtraTrainables, left_out: Collection[str] = ()
) -> dict[str, Any]:
    """Return what `readback.read_back` must return for this configuration.

    Args:
        config: the trial.
        modules: from `expected_modules`.
        extra: from `expected_extra_trainables`.
        left_out: from `left_out_layers`.

    Raises:
        TrialError: no layer is adapted.
    """
    if not modules and not extra.experts:
        raise TrialError(
            "lora.target_modules: this base has no linear layer to adapt",
            "If its layers are of the class Conv1D (GPT-2), set base.quantization: nf4, which makes them linear.",
        )
    base = config.base
    double_quant = base.double_quant if base.is_4bit else None
    held = {name: ("none", None) if name in left_out else (base.quantization, double_quant) for name in modules}
    held |= dict.fromkeys(extra.experts, (base.quantization if base.is_4bit else "none", double_quant))
    lora, training = config.lora, config.training
    ranks, alphas = layer_ranks(lora, (*modules, *extra.experts)), layer_alphas(lora, (*modules, *extra.experts))
    matrices = sum(ranks[name] * (i + o) + o * lora.dora for name, (i, o) in modules.items())
    matrices += sum(ranks[name] * number * (i + o) for name, (number, i, o) in extra.experts.items())
    return {
        "lora.rank": shared_or_by_layer(ranks),
        "lora.alpha": shared_or_by_layer(alphas),
        "lora.dropout": lora.dropout,
        "lora.target_modules": sorted({name.rpartition(".")[2] for name in modules} | expert_leaves(extra.experts)),
        "lora.num_modules": len(modules) + len(extra.experts),
        "lora.rslora": lora.rslora,
        "lora.dora": lora.dora,
        "lora.starts_from_base": lora.starts_from_base,
        "lora.modules_to_save": sorted(extra.saved),
        "base.new_tokens": dict(sorted(extra.tokens.items())),
        "base.quantization": shared_or_all(kind for kind, _ in held.values()),
        "base.double_quant": shared_or_all(double for _, double in held.values()),
        "training.learning_rate": training.learning_rate,
        "training.weight_decay": training.weight_decay,
        "training.max_grad_norm": training.max_grad_norm,
        "training.adapter_dtype": training.adapter_dtype,
        "training.optimizer": _LIVE_OPTIMIZERS[training.optimizer],
        "training.betas": [training.beta1, training.beta2] if training.has_betas else None,
        "training.epsilon": training.epsilon if training.is_adam else None,
        "training.momentum": training.momentum,
        "training.neftune_alpha": training.neftune_alpha,
        "training.loss": training.loss,
        "training.label_smoothing": training.label_smoothing,
        "num_trainable_parameters": matrices + extra.num_parameters,
    }


def _num_trained_biases(model: Any, lora: LoraSection, modules: LayerShapes) -> int:
    """Return how many bias values of a bare base will train."""
    if lora.bias == "none":
        return 0
    names = {f"{name}.bias" for name in modules}
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and (lora.bias == "all" or name in names)
    )


def ends_with(name: str, target: str) -> bool:
    """Return whether `target` is the layer's name or its last parts."""
    return name == target or name.endswith(f".{target}")


def _is_inside(name: str, module: str) -> bool:
    """Return whether a layer is, or is part of, a module of that name."""
    return f".{module}." in f".{name}."


def _layer_number(name: str) -> int | None:
    """Return the index of the decoder layer that contains this layer; None outside the decoder layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def shared_or_all(values: Iterable[Any]) -> Any:
    """Return the one value that all share, or else the sorted list of distinct values."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct[0] if len(distinct) == 1 else sorted(distinct, key=repr)


def shared_or_by_layer(values: Mapping[str, Any]) -> Any:
    """Return the one value that all layers share, or else the value of each layer."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else dict(values)
