"""AdamW's moments in eight bits, as bitsandbytes has them: a quarter of their memory (arXiv 2110.02861).

Each matrix of an adapter is a tensor of its own, whose elements follow each other as in PEFT's file. Each 256 of them
share their largest magnitude; a byte is the nearest of 256 values between -1 and 1 (second moment: 0 and 1). Matrices
of fewer than 4,096 elements stay in 32 bits (bitsandbytes 0.50, `optim/optimizer.py`, `Optimizer2State.init_state`).
A step is that of its CPU backend. Its CUDA kernels decay weights after the step, and give a negative first moment whose
nearest value is zero the next one below.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from orchestrator.training.fast.sizes import FLOAT, SHARED, SMALL, num_absmax, num_bytes

CHUNK = 512
"""Of a matrix, that one program of a kernel updates: whole blocks."""


def values_of_bytes(signed: bool) -> torch.Tensor:
    """(256,) ascending: of each decade down to 1e-6 the centres of even parts, half as many as of the next; 0 and 1.

    bitsandbytes' `create_dynamic_map` (arXiv 1511.04561), whose import takes longer than a kernel.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


@dataclass(frozen=True)
class Matrix:
    """One of an adapter's: where it lies in a slot's flat weights."""

    at: int
    features: int
    """Elements a rank."""
    is_b: bool
    """(features, rank of the stack), of which the first columns are its own; else A, (rank, features)."""


class EightBit:
    """What the moments of all slots have besides their bytes."""

    def __init__(self, matrices: Sequence[Matrix], rank: int, num_slots: int, device: torch.device) -> None:
        """
        Args:
            matrices: in the order of `Adapters.matrices`.
            rank: of the stack.
            num_slots: adapters that train together.
            device: of all of it.
        """
        self._features = [matrix.features for matrix in matrices]
        self._places: list[tuple[int, int]] = []
        """Of each matrix, its first byte in a slot's moment, and its first magnitude."""
        self.size = blocks = 0
        """Bytes of a slot's moment."""
        programs = []
        for matrix in matrices:
            most = matrix.features * rank
            self._places.append((self.size, blocks))
            programs += [
                (matrix.at, matrix.features, matrix.is_b, self.size, blocks, first) for first in range(0, most, CHUNK)
            ]
            self.size += num_bytes(most)
            blocks += num_absmax(most)
        self.programs = torch.tensor(programs, dtype=torch.int32, device=device)
        """(programs, 6): a `Matrix`, its first byte and magnitude, and which of its elements is the program's first."""
        self.magnitudes = torch.zeros(2, num_slots, blocks, dtype=torch.float32, device=device)
        """(moment, slot, block)."""
        self.maps = torch.stack([values_of_bytes(signed=True), values_of_bytes(signed=False)]).to(device)
        """(moment, 256) what a byte stands for, ascending."""
        self.bounds = (self.maps[:, 1:] + self.maps[:, :-1]) / 2
        """(moment, 255) half way between them."""

    def moments(self, slot: int, rank: int, rows: Sequence[torch.Tensor]) -> Iterator[tuple["Moment", "Moment"]]:
        """Both moments of each matrix of a slot, in place.

        Args:
            slot: whose.
            rank: of its adapter.
            rows: its first and its second moment, all bytes of each.
        """
        for features, (byte, block) in zip(self._features, self._places, strict=True):
            length = features * rank
            if length < SMALL:
                whole = slice(byte, byte + FLOAT * length)
                yield Moment(rows[0][whole], None, self.maps[0]), Moment(rows[1][whole], None, self.maps[1])
            else:
                whole, blocks = slice(byte, byte + length), slice(block, block + num_absmax(length))
                first, second = (
                    Moment(row[whole], magnitudes[slot, blocks], values)
                    for row, magnitudes, values in zip(rows, self.magnitudes, self.maps, strict=True)
                )
                yield first, second


@dataclass(frozen=True)
class Moment:
    """One moment of one matrix, as it is kept."""

    bytes: torch.Tensor
    magnitudes: torch.Tensor | None
    """(blocks,) float32; None where the bytes are of 32-bit values."""
    map: torch.Tensor

    def read(self) -> torch.Tensor:
        """(elements,) float32."""
        if self.magnitudes is None:
            return self.bytes.clone().view(torch.float32)  # a part of a copy may begin anywhere
        values: torch.Tensor = _operators().dequantize_blockwise(
            self.bytes, self.magnitudes, self.map, SHARED, torch.float32
        )
        return values

    def write(self, values: torch.Tensor) -> None:
        """(elements,) float32."""
        if self.magnitudes is None:
            self.bytes.view(torch.float32).copy_(values)
            return
        codes, magnitudes = _operators().quantize_blockwise(values, self.map, SHARED)
        self.bytes.copy_(codes)
        self.magnitudes.copy_(magnitudes)

    def state(self, number: int, shape: torch.Size) -> dict[str, torch.Tensor]:
        """As bitsandbytes' optimizer has it, in tensors that share nothing but the map.

        Args:
            number: of the moment, 1 or 2.
            shape: of the matrix.
        """
        if self.magnitudes is None:
            return {f"state{number}": self.read().view(shape)}
        return {
            f"state{number}": self.bytes.clone().view(shape),
            f"absmax{number}": self.magnitudes.clone(),
            f"qmap{number}": self.map,
        }

    def lay(self, number: int, state: Mapping[str, Any]) -> None:
        """Take what `state` gave, or bitsandbytes itself."""
        values = state[f"state{number}"].flatten()
        if self.magnitudes is None:
            self.bytes.view(torch.float32).copy_(values)
        else:
            self.bytes.copy_(values)
            self.magnitudes.copy_(state[f"absmax{number}"])


@cache
def _operators() -> Any:
    import bitsandbytes  # noqa: F401  # it registers them

    return torch.ops.bitsandbytes
