"""Begin a trial with the adapter of another one, or continue from another one's checkpoint, also at another rank."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights
from safetensors.torch import save_file

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


Pair = tuple[torch.Tensor, torch.Tensor]
"""Two tensors that belong to A and to B of a layer."""

_MOMENTS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))
"""Names of AdamW's moments in torch and in bitsandbytes."""


def change_moments(old: Pair, new: Pair, ratio: float, first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """Return AdamW's moments for an adapter that `change_rank` has changed.

    With A' = P A and B' = B M, the gradients of the new matrices are `ratio` times M^T dA and dB P^T. The first moment,
    a mean of gradients, is transformed in the same way. So is the second, with squared factors, as if the ranks'
    gradients were independent: a rotation is exact for the first moment alone. A rank that is new has no gradients yet:
    its first moment is zero. Its second is the mean over the other ranks, because a zero would make its first steps
    several times as large as the learning rate.

    Args:
        old: A (old rank, in_features) and B (out_features, old rank).
        new: the same after the change.
        ratio: the new scale, divided by the old one.
        first: the first moments of the old A and B.
        second: their second moments.
    """
    (a, b), (new_a, new_b) = old, new
    rank, before = new_a.shape[0], a.shape[0]
    if rank >= before:
        p = torch.eye(rank, before, dtype=torch.double)
        m = torch.eye(before, rank, dtype=torch.double) / ratio
    else:
        p = new_a.double() @ torch.linalg.pinv(a.double())
        m = torch.linalg.pinv(b.double()) @ new_b.double()
    (m_a, m_b), (v_a, v_b) = (tuple(each.double() for each in pair) for pair in (first, second))
    firsts = ratio * m.T @ m_a, ratio * m_b @ p.T
    seconds = ratio**2 * m.square().T @ v_a, ratio**2 * v_b @ p.square().T
    if rank > before:
        seconds[0][before:] = seconds[0][:before].mean(0)
        seconds[1][:, before:] = seconds[1][:, :before].mean(1, keepdim=True)
    return _like(first, firsts), _like(second, seconds)


def _like(old: Pair, new: Pair) -> Pair:
    return new[0].to(old[0].dtype).contiguous(), new[1].to(old[1].dtype).contiguous()


@contextmanager
def checkpoint_at_rank(folder: Path, trainer: Any, seed: int) -> Iterator[Path]:
    """Yield a checkpoint whose adapter has the ranks and scales of a trainer's model.

    This is the folder itself, or a copy for the time of the block if another trial with other ranks has written it.

    Args:
        folder: a checkpoint, as either engine writes it. Its optimizer is AdamW with moments in 32 bits if ranks or
            scales differ.
        trainer: the trial's SFTTrainer.
        seed: draws the rows of A that a higher rank adds.
    """
    config = LoraConfig.from_pretrained(str(folder))
    weights = load_peft_weights(str(folder), device="cpu")
    layers = lora_layers(trainer.model)
    before = {name: _rank_and_scale(config, name, weights) for name in layers}
    if all(
        rank == layer.r[ADAPTER] and math.isclose(scale, layer.scaling[ADAPTER])
        for (rank, scale), layer in zip(before.values(), layers.values(), strict=True)
    ):
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        copied = Path(shutil.copytree(folder, Path(parent) / folder.name))
        optimizer = torch.load(copied / "optimizer.pt", map_location="cpu", weights_only=True)
        numbers = _numbers_in_optimizer(trainer)
        generator = torch.Generator().manual_seed(seed)
        for name, layer in layers.items():
            keys = [f"base_model.model.{name}.lora_{matrix}.weight" for matrix in "AB"]
            a, b = (weights[key] for key in keys)
            (_, scale), new_scale = before[name], layer.scaling[ADAPTER]
            new = change_rank(a, b, layer.r[ADAPTER], scale, new_scale, generator)
            weights |= {key: matrix.contiguous() for key, matrix in zip(keys, new, strict=True)}
            of_a, of_b = (
                optimizer["state"][numbers[f"base_model.model.{name}.lora_{matrix}.{ADAPTER}.weight"]]
                for matrix in "AB"
            )
            one, two = next(names for names in _MOMENTS if names[0] in of_a)
            moments = change_moments((a, b), new, new_scale / scale, (of_a[one], of_b[one]), (of_a[two], of_b[two]))
            for key, (for_a, for_b) in zip((one, two), moments, strict=True):
                of_a[key], of_b[key] = for_a, for_b
        save_file(weights, copied / "adapter_model.safetensors", metadata={"format": "pt"})
        torch.save(optimizer, copied / "optimizer.pt")
        yield copied


def _rank_and_scale(config: LoraConfig, name: str, weights: dict[str, torch.Tensor]) -> tuple[int, float]:
    """Return the rank of a layer of a saved adapter, and the factor of B A."""
    rank = weights[f"base_model.model.{name}.lora_A.weight"].shape[0]
    return rank, _scale(config, name, rank)


def _numbers_in_optimizer(trainer: Any) -> dict[str, int]:
    """Return trained parameter -> its number in the optimizer's saved state.

    The Trainer puts those that decay into its first group (transformers 5.23, `create_optimizer`).
    """
    model = trainer.model
    decaying = set(trainer.get_decay_parameter_names(model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ordered = sorted(trained, key=lambda name: name not in decaying)
    return {name: number for number, name in enumerate(ordered)}


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    """Return the factor of B A in a layer of a saved adapter (PEFT 0.21, `LoraLayer.update_layer`)."""
    alphas = config.alpha_pattern or {}
    alpha = next((value for pattern, value in alphas.items() if matches_pattern(name, pattern)), config.lora_alpha)
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
