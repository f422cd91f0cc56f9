"""Decides which trials the fast engine can hold: by their configuration, their base and the limits of the kernels."""

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import torch

from orchestrator.positions import independent_length
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.base_shape import BaseShape, adapted_part
from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.settings import LAYER_TYPES, rope_parameters
from orchestrator.training.fast.families.text_model import TextModel, find_text_model, text_config, text_model
from orchestrator.training.fast.plan.memory import MAX_PASS_TOKENS
from orchestrator.training.fast.sizes import GROUPED_MULTIPLE, LONGEST_STEP
from orchestrator.training.fast.step.adapters import grouped_rank, padded_rank
from orchestrator.training.model.patterns import largest_rank
from orchestrator.training.model.precision import resolve_precision
from orchestrator.training.model.targets import adapted_names

MAX_RANK, MAX_HEAD = 256, 256
"""The largest rank and head size whose blocks fit into the shared memory of a multiprocessor."""

ROPE_TYPES = frozenset({"default", "dynamic", "linear", "llama3", "longrope", "yarn"})
"""Kinds of rotary embeddings that eligibility knows. Angles must depend on nothing but the position: see
`positions.independent_length`."""

MAX_ELEMENTS = 2**31
"""Elements of one tensor: the kernels index in 32 bits."""


def unsupported_reason(
    config: TrialConfig, base: Any, longest: int, grouped_products: bool | None = None
) -> str | None:
    """Return why the fast engine cannot hold a trial, or None where it can.

    Args:
        config: the trial.
        base: the base without adapters.
        longest: tokens of the longest row.
        grouped_products: whether the GPU on which the trial is to run has them (`has_grouped_products`); None asks
            this machine, which need not have a GPU.
    """
    if reason := config.fast_unsupported_reason():
        return reason
    names = adapted_names(base, config.lora)
    longest += config.evaluation.answer_tokens
    if reason := unsupported_shape(base, longest):
        return reason
    text = text_model(base)
    shape, family = BaseShape.of(text.config), FAMILIES[text.config.model_type]
    known = {f".{each}" for each in (*chain.from_iterable(family.groups), *shape.expert_matrices)}
    if others := sorted({adapted_part(name) for name in names if not name.endswith(tuple(known))}):
        return f"an adapter on {', '.join(others)}"
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1:
        return f"a base on {len(devices)} devices"
    on_gpu = grouped_products is not None or torch.cuda.is_available()
    return unsupported_reason_by_shape(config, shape, names, longest, on_gpu, grouped_products)


def unsupported_reason_by_shape(
    config: TrialConfig,
    shape: BaseShape,
    names: Collection[str],
    longest: int,
    on_gpu: bool,
    grouped_products: bool | None = None,
) -> str | None:
    """Check the part of `unsupported_reason` that needs no loaded base.

    Args:
        config: the trial.
        shape: sizes of the base.
        names: modules and parameters of experts that the trial adapts.
        longest: tokens of the longest row.
        on_gpu: whether the trial is to run on a GPU.
        grouped_products: whether a GPU that is not this machine's has them, and bfloat16; None asks this machine.
    """
    has_bf16 = None if grouped_products is None else True
    precision, dtype = resolve_precision(config.training, has_bf16), config.base.compute_dtype
    if (precision == "bf16" and dtype != "bfloat16") or dtype == "float16":
        return f"base.compute_dtype {dtype} under precision {precision}"
    if shape.experts and (shape.hidden % GROUPED_MULTIPLE or shape.expert_inner % GROUPED_MULTIPLE):
        features, multiple = f"{shape.hidden} and {shape.expert_inner} features", GROUPED_MULTIPLE
        return f"experts of {features} (grouped products take multiples of {multiple})"
    if on_gpu:
        if shape.experts and not (has_grouped_products() if grouped_products is None else grouped_products):
            return "experts on a GPU of compute capability other than 9.x and 10.x"
        if precision != "bf16":
            return f"precision {precision} on a GPU"
        if shape.head_size % 16 or shape.head_size > MAX_HEAD:
            return f"heads of {shape.head_size} features on a GPU (its kernels take multiples of 16 up to {MAX_HEAD})"
        rank = largest_rank(config.lora, names)
        if rank > MAX_RANK:
            return f"a rank over {MAX_RANK} on a GPU"
        adapter = sum(_stack_elements(shape, adapted_part(name), rank) for name in names)
        if (
            max(adapter, max(longest, MAX_PASS_TOKENS) * max(2 * shape.inner, 2 * shape.mlp_features, shape.qkv))
            >= MAX_ELEMENTS
        ):
            return "tensors of 2**31 elements and more"
    return None


def _stack_elements(shape: BaseShape, name: str, rank: int) -> int:
    """Return the elements of an adapter's stack on a GPU for one layer, or one matrix of all experts of a layer."""
    stack = grouped_rank(rank) if name in shape.expert_matrices else padded_rank(rank)
    return stack * shape.adapted_features(name)


def has_grouped_products() -> bool:
    """Return whether the GPU has grouped products that read their sizes on the device, as a CUDA graph must.

    torch 2.11 to 2.13 copies the sizes to the host on others (pytorch/pytorch issue 169970).
    """
    return torch.cuda.get_device_capability()[0] in (9, 10)


def unsupported_shape(model: Any, longest: int) -> str | None:
    """Return why the decoder cannot compute this base, or None where it can.

    Args:
        model: the base without adapters.
        longest: tokens of the longest row.
    """
    if not type(model).__module__.startswith("transformers.models."):
        return "a model with custom code"
    text = find_text_model(model)
    model_type = text_config(model.config).model_type
    family = FAMILIES.get(model_type)
    if family is None or text is None:
        return f"model type {model_type!r} (supported: {', '.join(FAMILIES)})"
    reasons = (
        unknown_field(text.config, family),
        _unsupported_positions(text.config, longest),
        _unsupported_cap(text),
        "a bias on the LM head" if model.get_output_embeddings().bias is not None else None,
        unknown_module(model, text, family),
        _unknown_weight(text, family, model.dtype),
    )
    return next((reason for reason in reasons if reason), None)


def unknown_field(config: Any, family: Family) -> str | None:
    """Return why a configuration field is refused, or None where all fields are understood.

    A field is refused if the family does not list it, or lists it as fixed and it has another value. A field that is
    None is not set. Names that begin with an underscore are transformers' own state.
    """
    listed = family.used_fields | family.harmless_fields
    for name, value in vars(config).items():
        if name.startswith("_") or value is None or name in listed:
            continue
        if name not in family.fixed_fields:
            return f"configuration field {name}, which is not listed for model type {family.model_type!r}"
        if value not in family.fixed_fields[name]:
            allowed = " or ".join(map(repr, family.fixed_fields[name]))
            return f"{name} {value!r} (supported: {allowed})"
    return None


def unknown_module(model: Any, text: TextModel, family: Family) -> str | None:
    """Return which module or parameter is refused or missing, or None where the family lists all of them.

    Towers of a multimodal base, which text does not reach, are left out.
    """
    layers, in_text = text.module.layers, f"{text.path}."
    in_layers = {id(module) for layer in layers for module in layer.modules()}
    outside = {
        name.replace(text.path, "model", 1)
        for name, module in model.named_modules()
        if id(module) not in in_layers
        and (name == text.path or name.startswith(in_text) or (name and not name.startswith("model")))
    }
    listed = family.model_modules
    if not family.rotates(text.config):
        listed -= {"model.rotary_emb"}
    if reason := _difference(outside, listed, "the model", family):
        return reason
    for index, layer in enumerate(layers):
        names = {name for name, _ in layer.named_modules() if name}
        place = f"layer {index}"
        if reason := _difference(names, family.layer_modules(layer), place, family):
            return reason
        parameters, known = set(_other_parameters(layer)), family.layer_parameters(layer)
        if extra := sorted(parameters - known):
            return f"parameter {extra[0]} in {place}, which its decoder does not read"
        if missing := sorted(known - parameters):
            return f"{place} without parameter {missing[0]}"
    return None


def _difference(found: set[str], listed: frozenset[str], place: str, family: Family) -> str | None:
    if extra := sorted(found - listed):
        return f"module {extra[0]} in {place}, which is not listed for model type {family.model_type!r}"
    if missing := sorted(listed - found):
        return f"{place} without module {missing[0]}"
    return None


def _other_parameters(layer: Any) -> Iterator[str]:
    """Yield the names of parameters other than the weights of modules and the biases of linear layers."""
    for owner, module in layer.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if name != "weight" and not (name == "bias" and isinstance(module, torch.nn.Linear)):
                yield f"{owner}.{name}".lstrip(".")


def _unsupported_positions(config: Any, longest: int) -> str | None:
    """Return why rotary embeddings are not those of the decoder, or None.

    The decoder reads angles from one table, so that they must depend on nothing but the position.
    """
    longest += -longest % LONGEST_STEP  # positions in the table
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if kinds:
        return f"layers of type {min(kinds)!r}"
    limit = independent_length(config)
    for rope in rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            return f"RoPE type {kind!r}"
        if limit is not None and longest > limit:
            return (
                f"RoPE type {kind!r} with rows of up to {longest} tokens: beyond {limit} the longest row changes angles"
            )
        # Queries are scaled from `original_max_position_embeddings` on (`get_llama_4_attn_scale` of transformers).
        scaled_from = rope.get("original_max_position_embeddings")
        if rope.get("llama_4_scaling_beta") and scaled_from is not None and longest > scaled_from:
            return f"llama_4_scaling_beta with rows of up to {longest} tokens: it scales queries beyond {scaled_from}"
    return None


def _unsupported_cap(text: TextModel) -> str | None:
    """Return why a cap of the logits is refused: Gemma 3's multimodal class does not apply it (transformers 5.23)."""
    if text.path != "model" and getattr(text.config, "final_logit_softcapping", None) is not None:
        return "final_logit_softcapping in a multimodal base"
    return None


def _unknown_weight(text: TextModel, family: Family, dtype: torch.dtype) -> str | None:
    for layer in text.module.layers:
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear) and not _is_known(linear, dtype):
                return f"{name} as a {type(linear).__name__} of {linear.weight.dtype}"
        for name in sorted(family.layer_parameters(layer)):
            parameter = layer.get_parameter(name)
            if getattr(parameter, "compute_dtype", parameter.dtype) != dtype:
                return f"{name} of {parameter.dtype}"
    return None


def _is_known(linear: Any, dtype: torch.dtype) -> bool:
    """Return whether a layer holds floats of the base's dtype, or NF4 or FP4 weights that compute in it."""
    from bitsandbytes.nn import Linear4bit

    if isinstance(linear, Linear4bit):
        return linear.compute_dtype in (None, dtype)
    return type(linear) is torch.nn.Linear and linear.weight.dtype == dtype
