"""Applied, not just asked: what the live modules and the optimizer hold after the first step."""

from collections.abc import Iterable
from typing import Any

from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import LoraSection, TrainingSection


def expected_modules(model: Any, lora: LoraSection) -> dict[str, tuple[int, int]]:
    """Linear layers of a bare base that the adapter should change: name -> (in_features, out_features).

    Raises:
        TrialError: `target_modules` names no layer of this base.
    """
    from torch.nn import Linear

    head = model.get_output_embeddings()
    layers = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module is not head
    }
    if lora.target_modules == "all-linear":
        return layers
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    for target in lora.target_modules:
        if not any(_matches(name, target) for name in layers):
            raise TrialError(
                f"lora.target_modules: {target!r} is no linear layer of this base; it has {', '.join(leaves)}"
            )
    return {name: shape for name, shape in layers.items() if any(_matches(name, t) for t in lora.target_modules)}


def expected(config: TrialConfig, modules: dict[str, tuple[int, int]], num_biases: int) -> dict[str, Any]:
    """What `read_back` must return for this configuration.

    Args:
        modules: from `expected_modules`.
        num_biases: trainable bias values that `lora.bias` asks for on this base.
    """
    lora, training = config.lora, config.training
    quantized = config.base.quantization != "none"
    return {
        "lora.rank": lora.rank,
        "lora.alpha": lora.alpha,
        "lora.dropout": lora.dropout,
        "lora.target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "lora.num_modules": len(modules),
        "training.learning_rate": training.learning_rate,
        "training.weight_decay": training.weight_decay,
        "training.adapter_dtype": training.adapter_dtype,
        "base.quantization": config.base.quantization,
        "base.double_quant": config.base.double_quant if quantized else None,
        "num_trainable_parameters": sum(lora.rank * (i + o) for i, o in modules.values()) + num_biases,
    }


def num_expected_biases(model: Any, lora: LoraSection, modules: dict[str, tuple[int, int]]) -> int:
    """Bias values of a bare base that will train."""
    if lora.bias == "none":
        return 0
    names = {f"{name}.bias" for name in modules}
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and (lora.bias == "all" or name in names)
    )


def read_back(model: Any, optimizer: Any) -> dict[str, Any]:
    """The same fields as `expected`, from the live adapter layers, their base weights and the optimizer."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    adapters = [_adapter_of(layer) for layer in layers.values()]
    groups = optimizer.param_groups
    # Parameters without decay (biases) have a group of their own at 0.
    decays = [group["weight_decay"] for group in groups if group["params"] and any(p.ndim > 1 for p in group["params"])]
    return {
        "lora.rank": _single(a["rank"] for a in adapters),
        "lora.alpha": _single(a["alpha"] for a in adapters),
        "lora.dropout": _single(a["dropout"] for a in adapters),
        "lora.target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "lora.num_modules": len(layers),
        "training.learning_rate": _single(group.get("initial_lr", group["lr"]) for group in groups),
        "training.weight_decay": _single(decays),
        "training.adapter_dtype": _single(a["dtype"] for a in adapters),
        "base.quantization": _single(a["quantization"] for a in adapters),
        "base.double_quant": _single(a["double_quant"] for a in adapters),
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def set_rate(trainer: Any, training: TrainingSection) -> None:
    """Put the configuration's learning rate and weight decay in force: a checkpoint's may be another trial's (PBT).

    Args:
        trainer: whose optimizer and schedule are there, and loaded.
        training: the configuration.
    """
    schedule = trainer.lr_scheduler
    schedule.base_lrs = [training.learning_rate for _ in schedule.base_lrs]
    for group, factor in zip(trainer.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = training.learning_rate
        group["lr"] = training.learning_rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]  # what the Trainer logs
    trainer.optimizer.param_groups[0]["weight_decay"] = training.weight_decay  # the other group holds biases


def compare(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise TrialError that names each field whose live value is not the configured one."""
    differences = [
        f"{name}: configured {value!r}, live {found[name]!r}"
        for name, value in wanted.items()
        if not same(value, found[name])
    ]
    if differences:
        raise TrialError("the live model differs from the trial's configuration: " + "; ".join(differences))


def _adapter_of(layer: Any) -> dict[str, Any]:
    from torch.nn import Identity

    (name,) = layer.lora_A.keys()
    rank = layer.lora_A[name].weight.shape[0]
    dropout = layer.lora_dropout[name]
    state = getattr(layer.get_base_layer().weight, "quant_state", None)
    return {
        "rank": rank,
        "alpha": round(layer.scaling[name] * rank, 9),
        "dropout": 0.0 if isinstance(dropout, Identity) else dropout.p,
        "dtype": str(layer.lora_A[name].weight.dtype).removeprefix("torch."),
        "quantization": state.quant_type if state is not None else "none",
        "double_quant": state.nested if state is not None else None,
    }


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _single(values: Iterable[Any]) -> Any:
    """The one value that all share, or the list of different ones."""
    distinct = sorted(set(values), key=repr)
    return distinct[0] if len(distinct) == 1 else distinct


def same(wanted: Any, found: Any) -> bool:
    """Equal, or two numbers within a millionth."""
    if isinstance(wanted, float) and isinstance(found, int | float):
        return abs(wanted - found) <= 1e-6 * abs(wanted)
    return bool(wanted == found)
