"""Read the configured values back from the live modules and the optimizer after the first step, and compare them."""

import math
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from bitsandbytes.nn import Int8Params, Params4bit
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch.nn import Identity

from orchestrator.adapters.expert_updates import AdaptedExperts, expert_layers
from orchestrator.errors import TrialError
from orchestrator.experts import PackedExperts
from orchestrator.spec.sections import TrainingSection
from orchestrator.training.model.adapter_init import SubtractInitialUpdate
from orchestrator.training.model.peft_model import ADAPTER, lora_layers
from orchestrator.training.model.targets import expert_leaves, shared_or_all, shared_or_by_layer


def read_back(trainer: Any) -> dict[str, Any]:
    """Return the fields of `targets.expected`, read from the live layers, base weights, optimizer and loss."""
    model = trainer.model
    experts = expert_layers(model)
    layers = lora_layers(model) | experts
    adapters = {name: _adapter_of(layer) for name, layer in layers.items()}
    inside = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    wrappers = {name: module for name, module in inside.items() if isinstance(module, TrainableTokensWrapper)}
    own_tokens = {name: each.token_adapter for name, each in wrappers.items() if not each.token_adapter.tied_adapter}
    embedding = model.get_base_model().get_input_embeddings()

    def shared(field: str) -> Any:
        return shared_or_all(adapter[field] for adapter in adapters.values())

    return {
        "lora.rank": shared_or_by_layer({name: adapter["rank"] for name, adapter in adapters.items()}),
        "lora.alpha": shared_or_by_layer({name: adapter["alpha"] for name, adapter in adapters.items()}),
        "lora.dropout": shared("dropout"),
        "lora.target_modules": sorted(
            {name.rpartition(".")[2] for name in layers.keys() - experts.keys()} | expert_leaves(experts)
        ),
        "lora.num_modules": len(layers),
        "lora.rslora": shared("rslora"),
        "lora.dora": shared("dora"),
        "lora.starts_from_base": shared("starts_from_base"),
        "lora.modules_to_save": sorted(
            name
            for name, module in inside.items()
            if isinstance(module, ModulesToSaveWrapper) and ADAPTER in module.modules_to_save
        ),
        "base.new_tokens": {name: list(each.token_indices[ADAPTER]) for name, each in sorted(own_tokens.items())},
        "base.quantization": shared("quantization"),
        "base.double_quant": shared("double_quant"),
        **_read_optimizer(trainer.optimizer),
        "training.max_grad_norm": trainer.args.max_grad_norm,
        "training.adapter_dtype": shared("dtype"),
        "training.neftune_alpha": vars(embedding).get("neftune_noise_alpha"),
        "training.loss": trainer.args.loss_type,
        "training.label_smoothing": trainer.label_smoother.epsilon if trainer.label_smoother else 0.0,
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _read_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return the fields of `targets.expected` that describe the optimizer."""
    own = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    library, groups = type(own).__module__.partition(".")[0], own.param_groups
    kind = f"{library}.{type(own).__name__}"
    if library == "bitsandbytes":
        kind += f" {own.args.optim_bits}-bit" + (" paged" if own.is_paged else "")
    elif groups[0].get("fused"):
        kind += " fused"
    # bitsandbytes' RMSprop names its smoothing constants betas, but transformers does not set them.
    has_betas = groups[0].get("betas") is not None and "RMSprop" not in kind
    is_adam = "AdamW" in kind or "AdEMAMix" in kind
    # Parameters without decay (biases) have a separate group with decay 0.
    decays = [group["weight_decay"] for group in groups if group["params"] and any(p.ndim > 1 for p in group["params"])]
    return {
        "training.optimizer": kind,
        "training.betas": shared_or_all(list(group["betas"])[:2] for group in groups) if has_betas else None,
        "training.epsilon": shared_or_all(group["eps"] for group in groups) if is_adam else None,
        "training.momentum": shared_or_all(group.get("momentum", 0.0) for group in groups),
        "training.learning_rate": shared_or_all(group.get("initial_lr", group["lr"]) for group in groups),
        "training.weight_decay": shared_or_all(decays),
    }


def set_rate(trainer: Any, training: TrainingSection) -> None:
    """Set the configured learning rate and weight decay. A checkpoint's may be those of another trial (PBT).

    Args:
        trainer: a trainer whose optimizer and schedule exist and have been loaded.
        training: the configuration.
    """
    schedule = trainer.lr_scheduler
    schedule.base_lrs = [training.learning_rate for _ in schedule.base_lrs]
    for group, factor in zip(trainer.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = training.learning_rate
        group["lr"] = training.learning_rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]  # what the Trainer logs
    trainer.optimizer.param_groups[0]["weight_decay"] = training.weight_decay  # group 1 has the biases


def require_applied(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare the live values with the configured ones.

    Raises:
        TrialError: names each field whose live value is not the configured one.
    """
    differences = [
        f"{name}: configured {value!r}, live {found[name]!r}"
        for name, value in wanted.items()
        if not same(value, found[name])
    ]
    if differences:
        raise TrialError("the live model differs from the trial's configuration: " + "; ".join(differences))


def _adapter_of(layer: Any) -> dict[str, Any]:
    (name,) = layer.lora_A.keys()
    base = layer.get_base_layer()
    is_expert = isinstance(layer, AdaptedExperts)
    rank = layer.lora_A[name].weight.shape[0] // (layer.num_experts if is_expert else 1)
    dropout = layer.lora_dropout[name]
    rslora = layer.use_rslora[name]
    return {
        "rank": rank,
        "alpha": round(layer.scaling[name] * (math.sqrt(rank) if rslora else rank), 9),
        "rslora": rslora,
        "dora": name in layer.lora_magnitude_vector and name in layer.lora_variant,
        "starts_from_base": any(isinstance(hook, SubtractInitialUpdate) for hook in base._forward_hooks.values()),
        "dropout": 0.0 if isinstance(dropout, Identity) else dropout.p,
        "dtype": str(layer.lora_A[name].weight.dtype).removeprefix("torch."),
        **_quantization_of(layer.get_param() if is_expert else base.weight),
    }


def _quantization_of(weight: Any) -> dict[str, Any]:
    if isinstance(weight, Params4bit):
        return {"quantization": weight.quant_state.quant_type, "double_quant": weight.quant_state.nested}
    if isinstance(weight, PackedExperts):
        return {"quantization": weight.quant_type, "double_quant": weight.double_quant}
    return {"quantization": "int8" if isinstance(weight, Int8Params) else "none", "double_quant": None}


def same(wanted: Any, found: Any) -> bool:
    """Return whether two values are equal; floats within a relative 1e-6; mappings and lists element by element."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return wanted.keys() == found.keys() and all(same(value, found[name]) for name, value in wanted.items())
    if isinstance(wanted, list) and isinstance(found, list | tuple):
        return len(wanted) == len(found) and all(map(same, wanted, found))
    if isinstance(wanted, float) and isinstance(found, int | float):
        return abs(wanted - found) <= 1e-6 * abs(wanted)
    return bool(wanted == found)
