"""Stacked adapters: the LoRA matrices of all slots in one flat tensor, a row a slot."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.training.fast.ops.eight_bit import EightBit, Matrix, Moment

BLOCK = 1024
"""Elements of a slot's flat weights that are all of one group's A, or of its B."""


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer that an adapter changes."""

    name: str
    number: int
    """In the model, counting all that could be adapted: dropout masks count by it, whatever else is adapted."""
    in_features: int
    column: int
    """Where its output begins in that of its group."""
    width: int
    """Its output features."""


@dataclass(frozen=True)
class LayerGroup:
    """Adapted layers that read the same input: their adapters lie together."""

    layers: tuple[AdaptedLayer, ...]
    a: int
    """Where A lies in a slot's flat weights: (layers * rank, in_features)."""
    b: int
    """Where B lies: (sum of widths, rank)."""

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    @property
    def width(self) -> int:
        """Adapted output features of all layers."""
        return sum(layer.width for layer in self.layers)


class Adapters:
    """LoRA weights, gradients and optimizer moments of `num_slots` adapters, each flat: (slots, size).

    Moments in eight bits are laid in another way: `eight_bit`.

    Ranks below `rank` are filled with zeros, which stay: where B's column is zero so is the gradient of A's row, and
    the other way round; AdamW then moves neither.
    """

    def __init__(
        self,
        adapted: Sequence[Sequence[AdaptedLayer]],
        num_slots: int,
        rank: int,
        dtype: torch.dtype,
        compute: torch.dtype,
        device: torch.device,
        eight_bit: bool = False,
    ) -> None:
        """
        Args:
            adapted: layers by the input that they share, from `adapted_layers`.
            num_slots: adapters that train together.
            rank: of the stack.
            dtype: of weights, and of moments that are not in eight bits.
            compute: of the adapters' products.
            device: of all of it.
            eight_bit: keep the moments in eight bits.
        """
        self.num_slots = num_slots
        self.rank = rank
        self.compute = compute
        self.places: list[LayerGroup | None] = []
        at, strides = 0, []
        for layers in adapted:
            if not layers:
                self.places.append(None)
                continue
            b = at + _whole_blocks(len(layers) * rank * layers[0].in_features)
            group = LayerGroup(tuple(layers), at, b)
            self.places.append(group)
            at = b + _whole_blocks(group.width * rank)
            strides += [(group.a, layers[0].in_features)] * ((b - group.a) // BLOCK)
            strides += [(b, 1)] * ((at - b) // BLOCK)
        self.weights = torch.zeros(num_slots, at, dtype=dtype, device=device)
        self._matrices = dict(self._lay_out())
        """By PEFT's names."""
        self.eight = EightBit(list(self._matrices.values()), rank, num_slots, device) if eight_bit else None
        """Where moments are kept so, what they have besides their bytes."""
        if self.eight is None:
            self.moment1, self.moment2 = (torch.zeros_like(self.weights) for _ in range(2))
        else:
            shape = num_slots, self.eight.size
            self.moment1, self.moment2 = (torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2))
        self.gradients = torch.zeros(num_slots, at, dtype=torch.float32, device=device)
        self.strides = torch.tensor(strides, dtype=torch.int32, device=device)
        """(size / BLOCK, 2) of each block, where its matrix begins, and how many elements on is the next rank."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, moments and gradients."""
        return sum(flat.nbytes for flat in (self.weights, self.moment1, self.moment2, self.gradients))

    def a(self, group: LayerGroup, flat: torch.Tensor) -> torch.Tensor:
        """A view of one of the flat tensors: (slots, layers * rank, in_features)."""
        rows = len(group.layers) * self.rank
        return flat[:, group.a : group.a + rows * group.in_features].unflatten(1, (rows, group.in_features))

    def b(self, group: LayerGroup, flat: torch.Tensor) -> torch.Tensor:
        """A view of one of the flat tensors: (slots, width, rank)."""
        return flat[:, group.b : group.b + group.width * self.rank].unflatten(1, (group.width, self.rank))

    def matrices(self, slot: int, rank: int, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of a slot's A (rank, in) and B (out, rank) by PEFT's names, without the adapter's.

        Args:
            slot: whose.
            rank: of its adapter.
            flat: weights, gradients, or moments that are laid as they are.
        """
        for name, matrix in self._matrices.items():
            stack = flat[slot, matrix.at : matrix.at + matrix.features * self.rank]
            if matrix.is_b:
                yield name, stack.unflatten(0, (matrix.features, self.rank))[:, :rank]
            else:
                yield name, stack.unflatten(0, (self.rank, matrix.features))[:rank]

    def in_eight_bits(self, slot: int, rank: int) -> Iterator[tuple[str, tuple[Moment, Moment]]]:
        """Both moments of each of a slot's matrices, in place, by the names of `matrices`."""
        assert self.eight is not None
        moments = self.eight.moments(slot, rank, (self.moment1[slot], self.moment2[slot]))
        return zip(self._matrices, moments, strict=True)

    def _lay_out(self) -> Iterator[tuple[str, Matrix]]:
        for group in filter(None, self.places):
            b = group.b
            for index, layer in enumerate(group.layers):
                a = group.a + index * self.rank * group.in_features
                yield f"{layer.name}.lora_A", Matrix(a, group.in_features, is_b=False)
                yield f"{layer.name}.lora_B", Matrix(b, layer.width, is_b=True)
                b += layer.width * self.rank

    def clear(self, slot: int) -> None:
        """Make a slot as if it had never been used."""
        for flat in (self.weights, self.moment1, self.moment2, self.gradients):
            flat[slot].zero_()
        if self.eight is not None:
            self.eight.magnitudes[:, slot].zero_()


def _whole_blocks(size: int) -> int:
    return size + -size % BLOCK


def padded_rank(rank: int) -> int:
    """The stack's rank for an adapter of this one: a power of two from 16 on, so that few graphs serve all ranks."""
    return max(16, 1 << (rank - 1).bit_length())


def lora_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of a PEFT model by the names of `Adapters.matrices`."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
