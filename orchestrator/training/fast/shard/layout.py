"""The bytes of a decoder layer: all its packed weights and scales in one buffer, cut into one piece for each rank."""

from collections.abc import Sequence
from math import prod

import torch

ALIGNMENT = 256
"""Each tensor begins at a multiple of so many bytes, as torch's own allocator aligns."""


class LayerLayout:
    """Where the tensors of a layer lie in its buffer."""

    def __init__(self, tensors: Sequence[torch.Tensor], num_ranks: int) -> None:
        """Lay out tensors one after another.

        Args:
            tensors: the layer's weights and scales. Only their shapes and dtypes are used.
            num_ranks: pieces to cut the buffer into.
        """
        self._kinds = [(each.dtype, each.shape) for each in tensors]
        self._offsets: list[int] = []
        at = 0
        for each in tensors:
            self._offsets.append(at)
            at += _rounded(each.nbytes, ALIGNMENT)
        self.num_bytes = _rounded(at, ALIGNMENT * num_ranks)
        """Bytes of the whole buffer."""
        self.shard_bytes = self.num_bytes // num_ranks
        """Bytes of one rank's piece."""

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """View the tensors in a uint8 buffer of at least `num_bytes`."""
        found = []
        for offset, (dtype, shape) in zip(self._offsets, self._kinds, strict=True):
            part = buffer[offset : offset + prod(shape) * dtype.itemsize]
            found.append(part.view(dtype).view(shape))
        return found

    def shard(self, tensors: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
        """Copy one rank's piece of these tensors: (shard_bytes,) uint8."""
        buffer = torch.zeros(self.num_bytes, dtype=torch.uint8, device=tensors[0].device)
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            view.copy_(tensor)
        return buffer[rank * self.shard_bytes : (rank + 1) * self.shard_bytes].clone()


def _rounded(size: int, multiple: int) -> int:
    return size + -size % multiple
