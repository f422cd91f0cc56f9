"""Begin a trial with the adapter of another one, also at another rank."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights

from orchestrator.training.model.patterns import matches_pattern
from orchestrator.training.model.peft_model import ADAPTER, load_adapter_weights, lora_layers


def change_rank(
    a: torch.Tensor, b: torch.Tensor, rank: int, scale: float, new_scale: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in_features) and B (out_features, rank) with `new_scale B A` equal to the old `scale B A`.

    A higher rank keeps the update: B gets columns of zeros, and A rows that are drawn as those of a new adapter. With
    zeros in both, neither would ever get a gradient. A lower rank keeps the best approximation of the update (Eckart
    and Young 1936): its largest singular values, whose roots go into A and B alike.

    Args:
        a: (old rank, in_features).
        b: (out_features, old rank).
        rank: the new rank.
        scale: factor of the old product.
        new_scale: factor of the new product.
        generator: draws the new rows of A, on the CPU.
    """
    if rank < a.shape[0]:
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = (s[:rank] * scale / new_scale).sqrt()
        kept = len(root)  # less than the rank where the layer is narrower
        a = (root[:, None] * (vh[:kept] @ q_a.T)).to(a.dtype)
        b = (q_b @ u[:, :kept] * root).to(b.dtype)
        scale = new_scale
    old, width = a.shape
    bound = 1 / math.sqrt(width)
    drawn = torch.empty(rank - old, width).uniform_(-bound, bound, generator=generator).to(a)
    return torch.cat([a, drawn]), torch.cat([b * (scale / new_scale), b.new_zeros(len(b), rank - old)], dim=1)


def begin_with(model: Any, folder: Path, seed: int) -> None:
    """Set the weights of a trial's adapter to those of another one.

    The layers must be the same. Their ranks and scales may differ, except those of fused experts, whose rank may not.

    Args:
        model: the trial's `PeftModel`.
        folder: PEFT files of the other adapter.
        seed: draws the rows of A that a higher rank adds.
    """
    config, weights = LoraConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(model).items():
        keys = [f"base_model.model.{name}.lora_{matrix}.weight" for matrix in "AB"]
        a, b = (weights[key] for key in keys)
        scale = _scale(config, name, a.shape[0])
        changed = change_rank(a, b, layer.r[ADAPTER], scale, layer.scaling[ADAPTER], generator)
        weights |= {key: matrix.contiguous() for key, matrix in zip(keys, changed, strict=True)}
    load_adapter_weights(model, weights)


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    """Return the factor of B A in a layer of a saved adapter (PEFT 0.21, `LoraLayer.update_layer`)."""
    alphas = config.alpha_pattern or {}
    alpha = next((value for pattern, value in alphas.items() if matches_pattern(name, pattern)), config.lora_alpha)
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
