"""Parts that the kernels of stacked adapters share: split-K sums, rank variants, a group's layers, dropout.

Split K. A sum over features is split among SPLITS programs, so that the device is full:

    split 0   sum of features [0, n)      --+
    split 1   sum of features [n, 2n)     --+--> split_k_workspace (float32) --> the last program to finish adds the
    ...                                   --+                                    parts up, always in the same order

A program knows that it is the last by a counter, its semaphore, which all programs of a sum increase once. The last one
sets it back to zero, so that the next kernel finds it so. Kernels that use the semaphores must therefore follow one
another on the same stream.

Rank variants. A kernel for several slots is compiled for the stack rank R, R/2 and R/4. A slot takes the smallest
variant that holds the largest rank of its layers. What lies beyond is neither read nor written, in `lora_hidden` and
its gradient either.

Names of kernel arguments, with their shapes (T tokens, S slots, R = RANK):

    x, dx                       (T, in)
    y, dy                       (T, out)
    lora_hidden, dlora_hidden   (T, layers * R)
    a, da                       (S, layers * R, in); the slots are `slot_stride` elements apart
    b, db                       (S, sum of widths, R); likewise
    split_k_workspace           (SPLITS, ...) float32, shaped as the result
    split_k_semaphores          int32, one for each sum
    tile_slots                  (T / TILE,) int32 slot of each tile
    first_tiles, end_tiles      (S,) int32 tiles of each slot
    dropout_positions           (T,) int32
    keys, thresholds, keep_scales, scales, slot_ranks   (S,) fields of `flat_batch.TABLE`
    factors                     (layers, S); the scale of a layer in a slot is `scales` times `factors`
    column0, width0, ...        first column of layer 0 in y, and the number of its columns; 0 where there is no layer
    module_id0, ...             `AdaptedLayer.module_id` of layer 0; likewise
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch

MAX_LAYERS = 3
"""Most layers of a group: queries, keys and values."""

# What differs between layers and buckets, and a table's place in its buffer, must not make a kernel of its own.
lora_kernel: Any = triton.jit(
    do_not_specialize=[
        "keys", "thresholds", "keep_scales", "scales", "factors", "slot_ranks", "first_tiles", "end_tiles", "num_tiles",
        "module_id0", "module_id1", "module_id2",
    ],
    do_not_specialize_on_alignment=["num_slots"],
)  # fmt: skip
"""Decorator of the kernels."""


def rank_variants(adapters: Adapters) -> int:
    """Return how many ranks a kernel is compiled for: R, R/2 and R/4, from 16 on. A single slot has R alone."""
    return 1 if adapters.num_slots == 1 else max(1, min(3, adapters.rank.bit_length() - 4))


def new_workspace(result: torch.Tensor, splits: int) -> torch.Tensor:
    """Allocate (splits, *result.shape) float32 for the parts of a sum; one element where it is not split."""
    return torch.empty((splits, *result.shape) if splits > 1 else 1, dtype=torch.float32, device=result.device)


@cache
def semaphores_on(device: torch.device) -> torch.Tensor:
    """Return the semaphores of a device, which each kernel finds and leaves at zero."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def dropout_fields(batch: FlatBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.table["key"], batch.table["threshold"], batch.table["keep_scale"]


def layer_factors(adapters: Adapters, group: LayerGroup) -> torch.Tensor:
    """Return the argument factors."""
    return adapters.factors[group.first_layer :]


def module_ids(group: LayerGroup) -> list[int]:
    """Return the arguments module_id0, module_id1 and module_id2."""
    return [layer.module_id for layer in group.layers] + [0] * (MAX_LAYERS - len(group.layers))


def column_ranges(group: LayerGroup) -> list[int]:
    """Return the arguments column0, width0, column1, width1, column2 and width2."""
    ranges = [value for layer in group.layers for value in (layer.column, layer.out_features)]
    return ranges + [0] * (2 * MAX_LAYERS - len(ranges))


def num_column_blocks(group: LayerGroup, block: int) -> int:
    return sum(triton.cdiv(layer.out_features, block) for layer in group.layers)


@triton.jit
def accumulate_or_store(total, gradient, part, inside, SPLITS: tl.constexpr):
    """Add a sum to the gradient where it is whole; else store it as a part in the workspace."""
    if SPLITS == 1:
        tl.store(gradient, tl.load(gradient, mask=inside) + total, mask=inside)
    else:
        tl.store(part, total, mask=inside)


@triton.jit
def takes_variant(rank, R: tl.constexpr, LAST: tl.constexpr):
    """Return whether a slot of this rank takes the variant R: the smallest that holds it. LAST has no smaller one."""
    if LAST:
        return rank <= R
    return (rank <= R) & (rank > R // 2)


@triton.jit
def reduce_split_k(
    total, out, split_k_workspace, split_k_semaphores, tokens, tile, layer, split, num_tiles, num_layers,
    RANK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write the sum of the (tokens, R) totals of all splits to the layer's first R of RANK columns of `out`."""
    R: tl.constexpr = total.shape[1]
    places = tokens[:, None] * (num_layers * RANK) + layer * RANK + tl.arange(0, R)[None, :]
    if SPLITS == 1:
        tl.store(out + places, total.to(out.dtype.element_ty))
    else:
        size = num_tiles * tokens.shape[0] * num_layers * RANK
        tl.store(split_k_workspace + split * size + places, total)
        if is_last_split(split_k_semaphores + tile * num_layers + layer, SPLITS):
            total = tl.zeros(total.shape, tl.float32)
            for each in tl.static_range(SPLITS):
                total += tl.load(split_k_workspace + each * size + places, cache_modifier=".cg")
            tl.store(out + places, total.to(out.dtype.element_ty))


@triton.jit
def is_last_split(semaphore, SPLITS: tl.constexpr):
    """Return whether all other programs that share the semaphore have stored their parts."""
    tl.debug_barrier()  # all threads of this program have stored theirs
    count = tl.atomic_add(semaphore, 1, sem="acq_rel")
    if count == SPLITS - 1:
        tl.store(semaphore, 0)
    return count == SPLITS - 1


@triton.jit
def locate_block(block, column0, width0, column1, width1, column2, width2, BLOCK: tl.constexpr):
    """Find the layer of a block of columns.

    Returns the layer, the block's first column within it, the layer's first row in B, its first column in y, and its
    width.
    """
    blocks0, blocks1 = tl.cdiv(width0, BLOCK), tl.cdiv(width1, BLOCK)
    layer = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    start = (block - pick(layer, 0, blocks0, blocks0 + blocks1)) * BLOCK
    b_row, column = pick(layer, 0, width0, width0 + width1), pick(layer, column0, column1, column2)
    return layer, start, b_row, column, pick(layer, width0, width1, width2)


@triton.jit
def pick(layer, value0, value1, value2):
    """Return the value of a layer."""
    return tl.where(layer == 0, value0, tl.where(layer == 1, value1, value2))


# The dropout mask is defined in `reference.dropout_mask`; the next three functions compute the same bits.


@triton.jit
def layer_key(key, module_id):
    """Return the key of one layer's mask."""
    key = key.to(tl.uint32, bitcast=True) ^ (module_id.to(tl.uint32) * 0x9E3779B9)
    key = (key ^ (key >> 16)) * 0x7FEB352D
    key = (key ^ (key >> 15)) * 0x846CA68B
    return key ^ (key >> 16)


@triton.jit
def token_words(key, positions):
    """Return the word of each token for the mask of one layer: (tokens,)."""
    words = positions.to(tl.uint32) ^ key
    words = (words ^ (words >> 16)) * 0x7FEB352D
    words ^= key * 0x85EBCA6B
    words = (words ^ (words >> 15)) * 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def is_kept(words, columns, threshold):
    """Return whether dropout keeps these tokens' features: (tokens,), (columns,) -> (tokens, columns)."""
    bits = (words[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B9)[None, :]) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits >= threshold.to(tl.uint32) * 2
