"""Draw an adapter's first weights, with a random generator that belongs to the trial.

PEFT would use the process's generator, which other trials share, and draw three times as many numbers as it uses. trl
then rounds the weights to bfloat16 (1.16, `SFTTrainer.__init__`). Here they are drawn on the base's device: for rank 64
on a base of 1.1B parameters, a CPU needs 0.9 s and a GPU 0.03 s. Therefore a GPU draws other numbers than a CPU.
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
from orchestrator.training.model.peft_model import ADAPTER, adapted_parts, lora_config

EVA_BATCHES, EVA_PASSES = 200, 1000
"""Most batches of training rows that EVA reads, and most passes in which its components must converge."""


def init_adapter(
    model: Any, lora: LoraSection, seed: int, dtype: torch.dtype, components: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Set an adapter's first weights, A (rank, in_features) and B (out_features, rank) of each layer or expert.

    default: A is uniform within 1 / sqrt(in_features), as in PEFT and `nn.Linear`; B is zero.
    gaussian: A is normal with standard deviation 1 / rank; B is zero.
    eva: A is taken from `components`; B is zero.
    olora, pissa: B A is a part of the base's weight; `SubtractInitialUpdate` takes it off the base layer's output.

    Args:
        model: a `PeftModel`.
        lora: its adapter's configuration.
        seed: seeds the generator.
        dtype: dtype of the weights.
        components: for eva, layer -> (rank, in_features), from `eva_components`.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    for name, layer in adapted_parts(model).items():
        lora_a, lora_b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        rank, shape = layer.r[ADAPTER], (lora_a.out_features, lora_a.in_features)  # experts have a rank each
        b = torch.zeros(lora_b.out_features, lora_b.in_features, device=device)
        if lora.starts_from_base:
            a, b = _factors_of_base(name, layer, lora, rank)
        elif components is not None:
            a = components[name]
        elif lora.init == "gaussian":
            a = torch.empty(shape, device=device).normal_(std=1 / rank, generator=generator)
        else:
            bound = 1 / math.sqrt(lora_a.in_features)
            a = torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
        layer_device = lora_a.weight.device  # a base may be spread over several GPUs
        # QR returns strided views, for which fused AdamW on a GPU rejects the gradients (torch 2.11).
        lora_a.weight.data, lora_b.weight.data = (each.to(layer_device, dtype).contiguous() for each in (a, b))
        if lora.starts_from_base:
            # PEFT would change the base's weights and quantize them again. Other trials share them, so a hook is used.
            a, b = (each.weight.detach().clone() for each in (lora_a, lora_b))
            hook = SubtractInitialUpdate(a, b, layer.scaling[ADAPTER])
            layer.get_base_layer().register_forward_hook(hook)


class SubtractInitialUpdate:
    """Forward hook that subtracts `scale * x A^T B^T` from a layer's output, as if its weight lacked `scale * B A`."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """
        Args:
            a: (rank, in_features).
            b: (out_features, rank).
            scale: factor of their product.
        """
        self._a, self._b, self._scale = a, b, scale

    def __call__(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        update = linear(linear(inputs[0].to(self._a.dtype), self._a), self._b) * self._scale
        return output - update.to(output.dtype)


def _factors_of_base(name: str, layer: Any, lora: LoraSection, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in_features) and B (out_features, rank) whose product is a part of the base's weight W.

    olora (arXiv 2406.01775): the first columns of Q and rows of R in W = QR; as in PEFT, the LoRA scale multiplies
    their product. pissa (arXiv 2404.02948): the part of W with the largest singular values, whose square roots go into
    A and B alike.

    Raises:
        TrialError: the rank is larger than a dimension of the weight.
    """
    weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
    if rank > min(weight.shape):
        raise TrialError(
            f"lora.init {lora.init} needs rank {rank} for {name}, whose weight has rank {min(weight.shape)} at most",
            "Lower lora.rank, or set a lower one for this layer in lora.rank_pattern.",
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
    """For each adapted layer, return the principal components (rank, in_features) of its inputs on training rows.

    PEFT computes EVA (arXiv 2410.07170). `rho` is 1, so that no rank moves between layers: a trial's rank is as
    configured.

    Args:
        model: a model that shares the base's weights.
        config: the trial; its seed orders the rows.
        data: the rows.
        modules: names of the adapted layers.

    Raises:
        TrialError: a layer has fewer input features than its rank, or the components do not converge.
    """
    known = lora_config(config, modules)
    for name in modules:
        rank = known.rank_pattern.get(get_pattern_key(known.rank_pattern, name), known.r)
        if rank > (width := model.get_submodule(name).in_features):
            raise TrialError(
                f"lora.init eva needs rank {rank} for {name}, whose input has only {width} features",
                "Lower lora.rank, or set a lower one for this layer in lora.rank_pattern.",
            )
    known.init_lora_weights, known.eva_config = "eva", EvaConfig(rho=1.0)
    known.target_modules = set(modules)
    passes = iter(range(EVA_PASSES))

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
        if next(passes, None) is None:
            raise TrialError(
                f"lora.init eva: the components of the layers' inputs have not converged in {EVA_PASSES} passes",
                "Lower lora.rank: the inputs may vary in fewer directions than that.",
            )
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    ranks = [config.lora.rank, *config.lora.rank_pattern.values()]
    batches = list(islice(_batches(config, data, 2 * max(ranks)), EVA_BATCHES))
    found = get_eva_state_dict(model, batches, known, forward_fn=forward, show_progress_bar=False)
    return {name: components.float().cpu() for name, components in found.items()}


def _batches(config: TrialConfig, data: PreparedData, targets: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of training rows, without end, in an order drawn from the trial's seed.

    Each batch has at least `targets` tokens with a loss.
    """
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.training.seed)).tolist()
    num_targets, rows = 0, []
    for index in cycle(order):
        row = data.train[index]
        rows.append(row)
        num_targets += sum(label != IGNORED for label in row["labels"])
        if num_targets >= targets:
            yield _padded(rows)
            num_targets, rows = 0, []


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack rows into (rows, longest), padded on the right; the padding is masked."""
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
