"""The settings that a slot really holds, beside those of the trainer's model and optimizer."""

from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.families.base_shape import adapted_part
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.model.readback import same
from orchestrator.training.model.targets import shared_or_by_layer


def held_settings(
    adapters: Adapters,
    slot: int,
    matrices: Mapping[str, torch.Tensor],
    table: Mapping[str, float],
    lora: LoraSection,
) -> dict[str, Any]:
    """Return the settings that a slot holds, by the names of `readback`. On a GPU this waits for the device.

    Args:
        adapters: the adapters of all slots.
        slot: the slot.
        matrices: its matrices, by the names of `Adapters.matrices`.
        table: its values of `flat_batch.TABLE`.
        lora: the trial's section, for the form of the scale only.
    """
    # A is (rank, in), of experts (experts, rank, in).
    ranks = {name.removesuffix(".lora_A"): a.shape[-2] for name, a in matrices.items() if name.endswith(".lora_A")}
    factors = adapters.layer_factors(slot)
    alphas = {name: table["scale"] * factors[name] / lora.scale(rank, 1.0) for name, rank in ranks.items()}
    alpha = next(iter(alphas.values()))
    return {
        "lora.rank": shared_or_by_layer(ranks),
        "lora.alpha": alpha if all(same(alpha, each) for each in alphas.values()) else alphas,
        "lora.dropout": 1 - 1 / table["keep_scale"],
        "lora.target_modules": sorted({adapted_part(name) for name in ranks}),
        "lora.num_modules": len(ranks),
        "training.weight_decay": table["weight_decay"],
        "training.adapter_dtype": str(adapters.weights.dtype).removeprefix("torch."),
        "num_trainable_parameters": sum(matrix.numel() for matrix in matrices.values()),
    }


def compared(live: Mapping[str, Any], held: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """Return the settings of the trainer where the slot holds the same, and both where they differ.

    The check of what was read back refuses a trial with two values.

    Args:
        live: settings of the trainer's model and optimizer.
        held: those of the slot.
        adapters: their moments show which optimizer the slot has.
    """
    optimizer = live["training.optimizer"]
    is_right = ("8-bit" in optimizer) == (adapters.eight_bit is not None)
    own = {**held, "training.optimizer": optimizer if is_right else f"{adapters.moment1.dtype} moments"}
    return {name: value if same(value, own.get(name, value)) else [value, own[name]] for name, value in live.items()}
