"""What the kernels of stacked adapters share: sums split among programs, a group's layers, dropout."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch

MAX_LAYERS = 3
"""Of a group: queries, keys and values."""

kernel: Any = triton.jit(
    do_not_specialize=[
        "keys", "thresholds", "keep_scales", "scales", "slot_ranks", "first_tiles", "end_tiles", "num_tiles",
        "number0", "number1", "number2",
    ],
    do_not_specialize_on_alignment=["num_slots"],
)  # fmt: skip
# What differs between layers and buckets makes no kernels of its own, nor does a table's place in its buffer.


def paths(adapters: Adapters) -> int:
    """Ranks that a kernel is made for: the stack's, half and quarter of it. A trial alone has the stack's own."""
    return 1 if adapters.num_slots == 1 else max(1, min(3, adapters.rank.bit_length() - 4))


def parts_of(whole: torch.Tensor, splits: int) -> torch.Tensor:
    return torch.empty((splits, *whole.shape) if splits > 1 else 1, dtype=torch.float32, device=whole.device)


@cache
def tickets_of(device: torch.device) -> torch.Tensor:
    """Counters that each kernel finds and leaves at zero."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def dropout(row: FlatBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return row.table["key"], row.table["threshold"], row.table["keep_scale"]


def numbers(group: LayerGroup) -> list[int]:
    """Of each layer, what its masks count by."""
    return [layer.number for layer in group.layers] + [0] * (MAX_LAYERS - len(group.layers))


def columns_of(group: LayerGroup) -> list[int]:
    """Of each layer, the first column and the number of columns of its output."""
    places = [value for layer in group.layers for value in (layer.column, layer.width)]
    return places + [0] * (2 * MAX_LAYERS - len(places))


def column_blocks(group: LayerGroup, block: int) -> int:
    return sum(triton.cdiv(layer.width, block) for layer in group.layers)


@triton.jit
def deliver(total, gradient, part, inside, SPLITS: tl.constexpr):
    if SPLITS == 1:
        tl.store(gradient, tl.load(gradient, mask=inside) + total, mask=inside)
    else:
        tl.store(part, total, mask=inside)


@triton.jit
def takes(rank, R: tl.constexpr, LAST: tl.constexpr):
    """Whether a slot of this rank is for the path of rank R, the narrowest that holds it; the last one is R's."""
    if LAST:
        return rank <= R
    return (rank <= R) & (rank > R // 2)


@triton.jit
def add_up(
    total, out, parts, tickets, tokens, tile, layer, split, num_tiles, num_layers,
    RANK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write the sum of all splits' (tokens, R) totals to the layer's first R of RANK columns of `out`."""
    R: tl.constexpr = total.shape[1]
    places = tokens[:, None] * (num_layers * RANK) + layer * RANK + tl.arange(0, R)[None, :]
    if SPLITS == 1:
        tl.store(out + places, total.to(out.dtype.element_ty))
    else:
        size = num_tiles * tokens.shape[0] * num_layers * RANK
        tl.store(parts + split * size + places, total)
        if is_last(tickets + tile * num_layers + layer, SPLITS):
            total = tl.zeros(total.shape, tl.float32)
            for each in tl.static_range(SPLITS):
                total += tl.load(parts + each * size + places, cache_modifier=".cg")
            tl.store(out + places, total.to(out.dtype.element_ty))


@triton.jit
def is_last(ticket, SPLITS: tl.constexpr):
    """Whether all other programs that share the ticket have left their parts."""
    tl.debug_barrier()  # this program's threads have
    taken = tl.atomic_add(ticket, 1, sem="acq_rel")
    if taken == SPLITS - 1:
        tl.store(ticket, 0)
    return taken == SPLITS - 1


@triton.jit
def layer_of(block, column0, width0, column1, width1, column2, width2, BLOCK: tl.constexpr):
    """Of a block of columns: its layer, where it begins there, the layer's first row in B, first column, and width."""
    blocks0, blocks1 = tl.cdiv(width0, BLOCK), tl.cdiv(width1, BLOCK)
    layer = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    start = (block - third(layer, 0, blocks0, blocks0 + blocks1)) * BLOCK
    row, column = third(layer, 0, width0, width0 + width1), third(layer, column0, column1, column2)
    return layer, start, row, column, third(layer, width0, width1, width2)


@triton.jit
def third(layer, value0, value1, value2):
    return tl.where(layer == 0, value0, tl.where(layer == 1, value1, value2))


@triton.jit
def layer_key(key, number):
    """The key of one layer's masks. How those are made is said in `plain.keep`."""
    key = key.to(tl.uint32, bitcast=True) ^ (number.to(tl.uint32) * 0x9E3779B9)
    key = (key ^ (key >> 16)) * 0x7FEB352D
    key = (key ^ (key >> 15)) * 0x846CA68B
    return key ^ (key >> 16)


@triton.jit
def words_of(key, count):
    """A word of each token for the masks of one layer."""
    words = count.to(tl.uint32) ^ key
    words = (words ^ (words >> 16)) * 0x7FEB352D
    words ^= key * 0x85EBCA6B
    words = (words ^ (words >> 15)) * 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def survives(words, columns, threshold):
    """Whether dropout keeps these tokens' features: (tokens,), (columns,) -> (tokens, columns)."""
    bits = (words[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B9)[None, :]) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits >= threshold.to(tl.uint32) * 2
