"""AdamW's moments in eight bits, as bitsandbytes keeps them: a quarter of the memory (arXiv 2110.02861).

Each matrix of an adapter is quantized by itself, its elements in the order of PEFT's file. Each block of 256 elements
shares its largest magnitude (`absmax`). A byte is an index into a table of 256 values (`code`): between -1 and 1 for
the first moment, between 0 and 1 for the second. Matrices of fewer than 4,096 elements stay in 32 bits (bitsandbytes
0.50, `optim/optimizer.py`, `Optimizer2State.init_state`).

A step is that of bitsandbytes' CPU backend. Its CUDA kernels differ in two points: they decay the weights after the
step, and they give a negative first moment whose nearest value is zero the next value below zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from orchestrator.training.fast.sizes import FLOAT, SHARED, SMALL, num_absmax, num_bytes

CHUNK = 512
"""Elements of a matrix that one program of the Triton kernel updates: whole blocks of 256."""


def dynamic_code(signed: bool) -> torch.Tensor:
    """Build the table that a byte is an index into: (256,) float32, ascending.

    Each of the seven decades up to 1 is cut into equal parts, and their centers are the values. A decade has half as
    many parts as the next one. 0 and 1 are added. This is `create_dynamic_map` of bitsandbytes (arXiv 1511.04561),
    whose import takes longer than a kernel.

    Args:
        signed: whether the table has negative values too.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        centers = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centers, -centers] if signed else [centers]
    return torch.cat(values).sort().values


@dataclass(frozen=True)
class MatrixLayout:
    """Place of one parameter of an adapter in a slot's flat weights.

    PEFT keeps a parameter as (outer, rank, inner): A of a linear layer is (1, rank, in_features) and B is
    (out_features, rank, 1); A of experts is (num_experts, rank, in_features) and B is (out_features, rank,
    num_experts).
    """

    offset: int
    """Its first element."""
    outer: int
    rank: int
    """Stack rank R. An adapter of rank r uses the first r ranks, all of them where r is more than R."""
    inner: int
    strides: tuple[int, int, int]
    """Distances in elements between neighbors in the three dimensions."""
    layer: int
    """Number of its layer among all adapted layers."""

    @classmethod
    def of_a(cls, offset: int, num_matrices: int, rank: int, features: int, layer: int) -> "MatrixLayout":
        """Describe (num_matrices, R, in_features), for the stack rank R."""
        return cls(offset, num_matrices, rank, features, (rank * features, features, 1), layer)

    @classmethod
    def of_b(cls, offset: int, num_matrices: int, rank: int, features: int, layer: int) -> "MatrixLayout":
        """Describe (num_matrices, out_features, R), for the stack rank R."""
        return cls(offset, features, rank, num_matrices, (rank, 1, features * rank), layer)

    @property
    def features(self) -> int:
        """Elements of one rank."""
        return self.outer * self.inner

    def num_elements(self, rank: int) -> int:
        """Return the number of elements of an adapter of this rank."""
        return self.features * min(rank, self.rank)

    def view(self, flat: torch.Tensor, rank: int) -> torch.Tensor:
        """View the parameter in a slot's row: (outer, rank, inner), without a dimension of 1 at one of the ends."""
        sizes, start = (self.outer, min(rank, self.rank), self.inner), flat.storage_offset() + self.offset
        view = flat.as_strided(sizes, self.strides, start)
        return view[0] if self.outer == 1 else view[..., 0] if self.inner == 1 else view


class EightBitMoments:
    """Scales, ranks and tables of the moments of all slots, and the place of each matrix among their bytes."""

    def __init__(self, matrices: Sequence[MatrixLayout], num_slots: int, device: torch.device) -> None:
        """Plan the layout for matrices of the full stack rank.

        Args:
            matrices: in the order of `Adapters.matrices`.
            num_slots: adapters that train together.
            device: of all tensors.
        """
        self._matrices = matrices
        self._offsets: list[tuple[int, int]] = []
        """For each matrix: its first byte in a slot's moment, and its first `absmax`."""
        self.bytes_per_slot = blocks = 0
        """Bytes of one moment of a slot."""
        programs = []
        for matrix in matrices:
            max_elements = matrix.num_elements(matrix.rank)
            self._offsets.append((self.bytes_per_slot, blocks))
            sizes = matrix.features, matrix.rank, matrix.inner
            shared = (matrix.offset, *sizes, *matrix.strides, self.bytes_per_slot, blocks, matrix.layer)
            first = torch.arange(0, max_elements, CHUNK, dtype=torch.int32)[:, None]
            programs.append(torch.cat((torch.tensor([shared], dtype=torch.int32).expand(len(first), -1), first), 1))
            self.bytes_per_slot += num_bytes(max_elements)
            blocks += num_absmax(max_elements)
        self.programs = torch.cat(programs).to(device)
        """(programs, 11) int32 for each program of the kernel: offset, features, rank, inner and the three strides of
        `MatrixLayout`, the matrix's first byte and first `absmax`, its layer, and the first element that the program
        updates."""
        ranks = {matrix.layer: matrix.rank for matrix in matrices}
        self.ranks = torch.tensor([[ranks[layer]] * num_slots for layer in range(len(ranks))], dtype=torch.int32).to(
            device
        )
        """(layers, S) the largest rank that each adapted layer may use."""
        self.absmax = torch.zeros(2, num_slots, blocks, dtype=torch.float32, device=device)
        """(moment, slot, block) largest magnitude of a block."""
        self.code = torch.stack([dynamic_code(signed=True), dynamic_code(signed=False)]).to(device)
        """(moment, 256) values that a byte is an index into, ascending."""
        self.midpoints = (self.code[:, 1:] + self.code[:, :-1]) / 2
        """(moment, 255) bounds half way between these values."""

    def moments(
        self, slot: int, ranks: Sequence[int], flat: Sequence[torch.Tensor]
    ) -> Iterator[tuple["Moment", "Moment"]]:
        """Yield both moments of each matrix of a slot. Writing to them changes the slot.

        Args:
            slot: the slot.
            ranks: of each matrix.
            flat: all bytes of its first moment, and of its second.
        """
        for matrix, rank, (byte, block) in zip(self._matrices, ranks, self._offsets, strict=True):
            length = matrix.num_elements(rank)
            if length < SMALL:
                whole = slice(byte, byte + FLOAT * length)
                yield Moment(flat[0][whole], None, self.code[0]), Moment(flat[1][whole], None, self.code[1])
            else:
                whole, blocks = slice(byte, byte + length), slice(block, block + num_absmax(length))
                first, second = (
                    Moment(bytes_of_slot[whole], absmax[slot, blocks], code)
                    for bytes_of_slot, absmax, code in zip(flat, self.absmax, self.code, strict=True)
                )
                yield first, second


@dataclass(frozen=True)
class Moment:
    """One moment of one matrix, as it is stored."""

    bytes: torch.Tensor
    """(elements,) uint8 indices into `code`, or the bytes of (elements,) float32 values."""
    absmax: torch.Tensor | None
    """(blocks,) float32; None where the bytes are those of float32 values."""
    code: torch.Tensor
    """(256,) float32."""

    def read(self) -> torch.Tensor:
        """Dequantize: (elements,) float32."""
        if self.absmax is None:
            return self.bytes.clone().view(torch.float32)  # a slice of a copy may not be aligned to 4 bytes
        values: torch.Tensor = _operators().dequantize_blockwise(
            self.bytes, self.absmax, self.code, SHARED, torch.float32
        )
        return values

    def write(self, values: torch.Tensor) -> None:
        """Quantize (elements,) float32 values and store them."""
        if self.absmax is None:
            self.bytes.view(torch.float32).copy_(values)
            return
        quantized, absmax = _operators().quantize_blockwise(values, self.code, SHARED)
        self.bytes.copy_(quantized)
        self.absmax.copy_(absmax)

    def state(self, number: int, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Return the state that bitsandbytes' optimizer has for this moment, in copies; only `code` is shared.

        Args:
            number: of the moment, 1 or 2.
            shape: of the matrix.
        """
        if self.absmax is None:
            return {f"state{number}": self.read().view(shape)}
        return {
            f"state{number}": self.bytes.clone().view(shape),
            f"absmax{number}": self.absmax.clone(),
            f"qmap{number}": self.code,
        }

    def load(self, number: int, state: Mapping[str, Any]) -> None:
        """Store a state that came from `state`, or from bitsandbytes' own optimizer.

        Args:
            number: of the moment, 1 or 2.
            state: of the parameter.
        """
        values = state[f"state{number}"].flatten()
        if self.absmax is None:
            self.bytes.view(torch.float32).copy_(values)
        else:
            self.bytes.copy_(values)
            self.absmax.copy_(state[f"absmax{number}"])


@cache
def _operators() -> Any:
    import bitsandbytes  # noqa: F401  # registers the operators

    return torch.ops.bitsandbytes
