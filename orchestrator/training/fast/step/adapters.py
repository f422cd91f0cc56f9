"""Stacked adapters: the LoRA matrices of all slots in one flat tensor, one row for each slot.

The row of a slot, for each group of layers that share an input:

    | A of layer 0 (R, in) | A of layer 1 | ... | pad | B of layer 0 (out, R) | B of layer 1 | ... | pad |
    ^ a_offset                                        ^ b_offset

The matrices of all experts of a layer (`step.experts`) are a group of their own, with the A of expert 0, of expert 1,
and so on, then the B of each.

R is the stack rank; experts have one of their own. A layer of rank r < R uses the first r rows of each A and the first
r columns of each B. Padding makes each part a whole number of `BLOCK`s.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.training.fast.ops.eight_bit import EightBitMoments, MatrixLayout, Moment
from orchestrator.training.fast.sizes import GROUPED_MULTIPLE

BLOCK = 1024
"""Elements of a slot's row that all belong to the A part of one group, or all to its B part."""


NO_DROPOUT = -1
"""In place of the number of a layer whose adapter has no dropout."""


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer, or one matrix of all experts of a layer, that has an adapter."""

    name: str
    """Name of the layer, or of the parameter that holds the matrices."""
    module_id: int
    """Number of the layer among all layers of the model that could have an adapter. Its dropout mask is derived from
    it, so that the mask does not depend on which other layers have one. `NO_DROPOUT` for experts."""
    in_features: int
    column: int
    """First column of its output within the output of its group."""
    out_features: int
    num_matrices: int = 1
    """Number of the experts; 1 for a linear layer."""


@dataclass(frozen=True)
class LayerGroup:
    """Adapted layers that read the same input. Their matrices lie side by side."""

    layers: tuple[AdaptedLayer, ...]
    a_offset: int
    """First element of the A part in a slot's row: (layers * R, in_features); of experts (num_matrices, R, ...)."""
    rank: int
    """Stack rank R of its matrices."""
    b_offset: int
    """First element of the B part: (sum of out_features, R); of experts (num_matrices, out_features, R)."""
    first_layer: int
    """Number of its first layer among all adapted layers."""

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    @property
    def out_features(self) -> int:
        """Output features of all adapted layers together."""
        return sum(layer.out_features for layer in self.layers)

    @property
    def num_matrices(self) -> int:
        """Number of the experts; 1 for linear layers."""
        return self.layers[0].num_matrices


class Adapters:
    """LoRA weights, gradients and AdamW moments of `num_slots` adapters, each a tensor (S, size).

    Moments in eight bits have another layout: see `eight_bit`.

    What lies beyond a layer's own rank is zero, and stays zero: where a column of B is zero, so is the gradient of the
    row of A, and the other way round. AdamW then moves neither.
    """

    def __init__(
        self,
        adapted: Sequence[Sequence[AdaptedLayer]],
        num_slots: int,
        rank: int,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
        eight_bit: bool = False,
        expert_rank: int = 0,
    ) -> None:
        """Allocate everything, filled with zeros.

        Args:
            adapted: layers by the input that they share, from `decoder.adapted_layers`.
            num_slots: adapters that train together.
            rank: stack rank R.
            dtype: of the weights, and of moments that are not in eight bits.
            compute_dtype: of the products with A and B.
            device: of all tensors.
            eight_bit: whether to keep the moments in eight bits.
            expert_rank: stack rank of experts, where any are adapted.
        """
        self.num_slots = num_slots
        self.rank = rank
        self.compute_dtype = compute_dtype
        self.groups: list[LayerGroup | None] = []
        """In the order of `adapted`; None where no layer is adapted."""
        self._layers = [layer.name for layers in adapted for layer in layers]
        at, rank_layout = 0, []
        for layers in adapted:
            if not layers:
                self.groups.append(None)
                continue
            count = layers[0].num_matrices
            own_rank = expert_rank if count > 1 else rank
            b_offset = at + _whole_blocks(len(layers) * count * own_rank * layers[0].in_features)
            first_layer = sum(len(group.layers) for group in self.groups if group is not None)
            group = LayerGroup(tuple(layers), at, own_rank, b_offset, first_layer)
            self.groups.append(group)
            at = b_offset + _whole_blocks(count * group.out_features * own_rank)
            rank_layout.append((group.a_offset, layers[0].in_features, own_rank - 1, (b_offset - group.a_offset)))
            rank_layout.append((b_offset, 1, own_rank - 1, (at - b_offset)))
        self.factors = torch.ones(len(self._layers), num_slots, dtype=torch.float32, device=device)
        """(layers, S) factor of the slot's scale in each adapted layer."""
        self._full_ranks = [group.rank for group in self.groups if group is not None for _ in group.layers]
        self._ranks = [self._full_ranks] * num_slots
        """Slot -> the largest rank that each adapted layer may use, on the host."""
        self.weights = torch.zeros(num_slots, at, dtype=dtype, device=device)
        self._matrices = dict(self._matrix_layouts())
        """Layouts by PEFT's names."""
        self.eight_bit = EightBitMoments(list(self._matrices.values()), num_slots, device) if eight_bit else None
        """Scales, ranks and tables of moments in eight bits; None where the moments have another dtype."""
        if self.eight_bit is None:
            self.moment1, self.moment2 = (torch.zeros_like(self.weights) for _ in range(2))
        else:
            shape = num_slots, self.eight_bit.bytes_per_slot
            self.moment1, self.moment2 = (torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2))
        self.gradients = torch.zeros(num_slots, at, dtype=torch.float32, device=device)
        parts = torch.tensor(rank_layout, dtype=torch.int32).view(-1, 4)
        self.rank_layout = parts[:, :3].repeat_interleave(parts[:, 3] // BLOCK, dim=0).to(device)
        """(size / BLOCK, 3) for each block: the first element of its part, the distance in elements from a rank to the
        next, and the last rank R - 1. The rank of element i is thus (i - first) // distance % R."""

    @property
    def adapts_experts(self) -> bool:
        """Whether any matrix of experts has adapters."""
        return any(group.num_matrices > 1 for group in self.groups if group is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, moments and gradients."""
        return sum(flat.nbytes for flat in (self.weights, self.moment1, self.moment2, self.gradients))

    def a(self, group: LayerGroup, flat: torch.Tensor) -> torch.Tensor:
        """View the A part of a group in one of the flat tensors: (S, layers * R, in_features)."""
        rows = len(group.layers) * group.num_matrices * group.rank
        part = flat[:, group.a_offset : group.a_offset + rows * group.in_features]
        return part.unflatten(1, (rows, group.in_features))

    def b(self, group: LayerGroup, flat: torch.Tensor) -> torch.Tensor:
        """View the B part of a group in one of the flat tensors: (S, out_features, R)."""
        rows = group.num_matrices * group.out_features
        part = flat[:, group.b_offset : group.b_offset + rows * group.rank]
        return part.unflatten(1, (rows, group.rank))

    def expert_a(self, group: LayerGroup, flat: torch.Tensor) -> torch.Tensor:
        """View the A part of experts in one of the flat tensors: (S, experts, R, in_features)."""
        return self.a(group, flat).unflatten(1, (group.num_matrices, group.rank))

    def expert_b(self, group: LayerGroup, flat: torch.Tensor) -> torch.Tensor:
        """View the B part of experts in one of the flat tensors: (S, experts, out_features, R)."""
        return self.b(group, flat).unflatten(1, (group.num_matrices, group.out_features))

    def set_patterns(self, slot: int, ranks: Mapping[str, int], factors: Mapping[str, float]) -> None:
        """Give the layers of a slot ranks and scales of their own. `clear` takes them back.

        Args:
            slot: the slot.
            ranks: name of a layer -> its rank.
            factors: name of a layer -> factor of the slot's scale.
        """
        self._ranks[slot] = [ranks.get(name, full) for name, full in zip(self._layers, self._full_ranks, strict=True)]
        own_factors = torch.tensor([factors.get(name, 1.0) for name in self._layers])
        self.factors[:, slot].copy_(own_factors, non_blocking=True)
        if self.eight_bit is not None:
            own_ranks = torch.tensor(self._ranks[slot], dtype=torch.int32)
            self.eight_bit.ranks[:, slot].copy_(own_ranks, non_blocking=True)

    def layer_factors(self, slot: int) -> dict[str, float]:
        """Return each layer's factor of a slot's scale, by the layer's name. On a GPU this waits for the device."""
        return dict(zip(self._layers, self.factors[:, slot].tolist(), strict=True))

    def matrices(self, slot: int, rank: int, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield views of a slot's A (r, in) and B (out, r) by the layers' names and `lora_A` or `lora_B`.

        Of experts they are (experts, r, in) and (out, r, experts), which PEFT keeps in two dimensions: (experts * r,
        in) and (out, r * experts).

        Args:
            slot: the slot.
            rank: largest rank of its layers. A layer's r may be smaller (`set_patterns`). It may exceed the stack rank
                of experts, if the adapter has none.
            flat: weights, gradients, or moments that are not in eight bits.
        """
        for name, matrix in self._matrices.items():
            yield name, matrix.view(flat[slot], min(rank, self._ranks[slot][matrix.layer]))

    def eight_bit_moments(self, slot: int, rank: int) -> Iterator[tuple[str, tuple[Moment, Moment]]]:
        """Yield both moments of each of a slot's matrices by the names of `matrices`. Writing to them changes the slot.

        Args:
            slot: the slot.
            rank: largest rank of its layers.
        """
        assert self.eight_bit is not None
        ranks = [min(rank, self._ranks[slot][matrix.layer]) for matrix in self._matrices.values()]
        moments = self.eight_bit.moments(slot, ranks, (self.moment1[slot], self.moment2[slot]))
        return zip(self._matrices, moments, strict=True)

    def _matrix_layouts(self) -> Iterator[tuple[str, MatrixLayout]]:
        for group in filter(None, self.groups):
            b_offset, count, rank = group.b_offset, group.num_matrices, group.rank
            for index, layer in enumerate(group.layers):
                a_offset, number = group.a_offset + index * rank * group.in_features, group.first_layer + index
                yield f"{layer.name}.lora_A", MatrixLayout.of_a(a_offset, count, rank, group.in_features, number)
                yield f"{layer.name}.lora_B", MatrixLayout.of_b(b_offset, count, rank, layer.out_features, number)
                b_offset += layer.out_features * rank

    def clear(self, slot: int) -> None:
        """Reset a slot to the state before its first use."""
        for flat in (self.weights, self.moment1, self.moment2, self.gradients):
            flat[slot].zero_()
        if self.eight_bit is not None:
            self.eight_bit.absmax[:, slot].zero_()
        self.set_patterns(slot, {}, {})


def _whole_blocks(size: int) -> int:
    return size + -size % BLOCK


def padded_rank(rank: int) -> int:
    """Return the stack rank for an adapter: the next power of two from 16 on, so that few graphs serve all ranks."""
    return max(16, 1 << (rank - 1).bit_length())


def grouped_rank(rank: int) -> int:
    """Return the stack rank of experts for an adapter: a power of two, and a size that grouped products take."""
    return max(GROUPED_MULTIPLE, 1 << (rank - 1).bit_length())


def lora_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the LoRA parameters of a PEFT model by the names of `Adapters.matrices`, in the order of the model.

    PEFT 0.21 wraps a module once for each of its parameters that is adapted (`ParamWrapper`). Which wrapper is inside
    depends on the others, so the parameter's own name is used.
    """
    adapted = {
        name: f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name")
    }
    found = {}
    for name, parameter in model.named_parameters():
        layer, _, matrix = name.removesuffix(".default.weight").rpartition(".")
        if matrix in ("lora_A", "lora_B"):
            found[f"{adapted.get(layer, layer)}.{matrix}".removeprefix("base_model.model.")] = parameter
    return found
