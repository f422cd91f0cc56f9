"""Limits and sizes on which both the memory plan and the computation rest. Imports no other module of the package."""

from typing import Literal

Recompute = Literal["nothing", "elementwise", "layers"]
"""What the backward computes again.

- "nothing": all activations are kept.
- "elementwise": norms and gated products.
- "layers": everything but each layer's input.
"""

EVALUATION_TOKENS = 8192
"""Most tokens of one evaluation pass, which keeps no activations."""

GROUPED_MULTIPLE = 8
"""Grouped products take matrices whose sizes are multiples of this: rows begin at multiples of 16 bytes."""

MAX_GROUPS = 1023
"""Most groups of one grouped product on a GPU (torch 2.11 to 2.13, `GroupMM.cu`)."""

MAX_LOGITS = 1 << 26
"""Most elements of the logits that exist at a time."""

FLOAT = 4
"""Bytes of a float32."""

SHARED = 256
"""Consecutive elements of an 8-bit moment that share one absolute maximum."""

SMALL = 4096
"""Elements from which on a matrix has 8-bit moments. The moments of smaller matrices stay in 32 bits."""


LONGEST_STEP = 64
"""The longest sequence is rounded up to a multiple of so many tokens, so that a tile's filler is never longer."""


def num_bytes(most: int) -> int:
    """Return the upper bound, in bytes, of one 8-bit moment of a matrix with up to `most` elements.

    Matrices below `SMALL` elements stay in 32 bits, so a smaller matrix can need more bytes than a larger one. The
    bound is a multiple of 16.
    """
    size = max(most, FLOAT * min(most, SMALL - 1))
    return size + -size % 16


def num_absmax(elements: int) -> int:
    """Return the number of absolute maxima (float32) that an 8-bit moment of so many elements has."""
    return -(-elements // SHARED)
