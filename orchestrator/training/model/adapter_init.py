"""An adapter's first weights, drawn with a generator of the trial's own.

PEFT takes the process's, which trials beside this one share, and draws three times as many numbers as it uses; then
trl rounds them to bfloat16 (1.16, `SFTTrainer.__init__`). Here they are drawn on the base's device: at rank 64 of 1.1B
a host takes 0.9 s for what a GPU makes in 0.03. So a GPU's numbers are others than a CPU's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from peft import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key

from orchestrator.data import PreparedData
from orchestrator.data.encode import IGNORED
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import LoraSection
from orchestrator.training.model.peft_model import ADAPTER, lora_config, lora_layers

EVA_BATCHES, EVA_PASSES = 200, 1000
"""Batches of training rows that EVA looks at, and passes over them in which its components must have settled."""


def init_adapter(
    model: Any, lora: LoraSection, seed: int, dtype: torch.dtype, read: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Lay an adapter's first weights.

    default: A uniform within 1 / sqrt(in_features), as PEFT and `nn.Linear` have it; B zero. gaussian: A normal, of
    deviation 1 / rank. eva: A from `read`. olora, pissa: A and B make a part of the base's weight, which the base
    layer's result then lacks (`Without`).

    Args:
        model: a `PeftModel`.
        lora: its adapter.
        seed: of the generator.
        dtype: of the weights.
        read: for eva, layer -> (rank, in_features), from `eva_components`.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    for name, layer in lora_layers(model).items():
        first, second = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        rank, width = first.out_features, first.in_features
        b = torch.zeros(second.out_features, rank, device=device)
        if lora.starts_from_base:
            a, b = _part_of_base(name, layer, lora, rank)
        elif read is not None:
            a = read[name]
        elif lora.init == "gaussian":
            a = torch.empty(rank, width, device=device).normal_(std=1 / rank, generator=generator)
        else:
            most = 1 / math.sqrt(width)
            a = torch.empty(rank, width, device=device).uniform_(-most, most, generator=generator)
        own = layer.get_base_layer().weight.device  # a base may lie on several GPUs
        # Contiguous: QR gives views with gaps, for which fused AdamW on a GPU refuses its gradients (torch 2.11).
        first.weight.data, second.weight.data = (each.to(own, dtype).contiguous() for each in (a, b))
        if lora.starts_from_base:
            # A hook, for the base's weights serve others: PEFT would write to them, and quantise the rest again.
            without = Without(first.weight.detach().clone(), second.weight.detach().clone(), layer.scaling[ADAPTER])
            layer.get_base_layer().register_forward_hook(without)


class Without:
    """Takes `scale * B A` of its input from what a layer returns: as if its weight lacked that."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """
        Args:
            a: (rank, in).
            b: (out, rank).
            scale: of their product.
        """
        self._a, self._b, self._scale = a, b, scale

    def __call__(self, layer: Any, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        part = linear(linear(given[0].to(self._a.dtype), self._a), self._b) * self._scale
        return result - part.to(result.dtype)


def _part_of_base(name: str, layer: Any, lora: LoraSection, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank).

    olora: the first columns of Q and rows of R in W = QR (as in PEFT, they count times the scale). pissa: the largest
    singular values' part of W, halved evenly between A and B.

    Raises:
        TrialError: the weight has no such rank.
    """
    weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
    if rank > min(weight.shape):
        raise TrialError(
            f"lora.init {lora.init} takes rank {rank} of {name}, whose weight has at most {min(weight.shape)}",
            "Lower lora.rank, or give the layer another in lora.rank_pattern.",
        )
    if lora.init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / layer.scaling[ADAPTER]).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def eva_components(
    model: Any, config: TrialConfig, data: PreparedData, modules: Sequence[str]
) -> dict[str, torch.Tensor]:
    """For each adapted layer the principal components (rank, in_features) of what it reads on training rows.

    EVA (arXiv 2410.07170) by PEFT, without moving ranks between layers (rho 1): a trial's rank is as configured.

    Args:
        model: a shell of the base.
        config: the trial; its seed orders the rows.
        data: rows.
        modules: names of the adapted layers.

    Raises:
        TrialError: a layer reads fewer features than its rank, or the components do not settle.
    """
    known = lora_config(config, modules)
    for name in modules:
        rank = known.rank_pattern.get(get_pattern_key(known.rank_pattern, name), known.r)
        if rank > (width := model.get_submodule(name).in_features):
            raise TrialError(
                f"lora.init eva takes rank {rank} of what {name} reads, which has {width} features",
                "Lower lora.rank, or give the layer another in lora.rank_pattern.",
            )
    known.init_lora_weights, known.eva_config = "eva", EvaConfig(rho=1.0)
    known.target_modules = set(modules)
    passes = iter(range(EVA_PASSES))

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
        if next(passes, None) is None:
            raise TrialError(
                f"lora.init eva: what the layers read has not settled in {EVA_PASSES} passes",
                "Lower lora.rank: the training rows may not have so many directions.",
            )
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    ranks = [config.lora.rank, *config.lora.rank_pattern.values()]
    batches = list(islice(_batches(config, data, 2 * max(ranks)), EVA_BATCHES))
    found = get_eva_state_dict(model, batches, known, forward_fn=forward, show_progress_bar=False)
    return {name: components.float().cpu() for name, components in found.items()}


def _batches(config: TrialConfig, data: PreparedData, targets: int) -> Iterator[dict[str, torch.Tensor]]:
    """Training rows again and again, in an order of the trial's seed, with at least so many targets a batch."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.training.seed)).tolist()
    found, taken = 0, []
    for index in cycle(order):
        row = data.train[index]
        taken.append(row)
        found += sum(label != IGNORED for label in row["labels"])
        if found >= targets:
            yield _padded(taken)
            found, taken = 0, []


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Filled on the right; the filler is masked."""
    longest = max(len(row["input_ids"]) for row in rows)
    shape = len(rows), longest
    ids, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
