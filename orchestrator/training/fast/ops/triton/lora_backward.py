"""Stacked adapters in Triton, backward: two kernels, each for all layers of a group at once.

    _up_backward     dlora_hidden = scale * dy B             sums over columns; programs (layers, SPLITS, tiles)
                     db += scale * dy^T lora_hidden          sums over a slot's tiles; programs (column blocks, slots)

        both kinds of programs take turns in one launch, so that the dy that one has read is in the cache for the other:
        [dlora_hidden] [dlora_hidden] [db] [dlora_hidden] [dlora_hidden] [db] ...

    _down_backward   da += keep_scale * dlora_hidden^T dropout(x)         grid (feature blocks, SPLITS, slots)
                     dx += keep_scale * dropout'(dlora_hidden A)

        x, dx (T, in)              a program has one block of features, and a part of the tiles of one slot;
        +-----+-----+-----+        it goes over these tiles: each tile of dx is complete, da is a sum over them,
        |     | blk |     | tile   which split K completes
        |     |  |  |     | tile
        |     |  v  |     | tile
        +-----+-----+-----+

`dropout'` applies the same mask to the gradient. Split K, rank variants and the arguments are described in
`lora_common`.

The sizes below were tuned on an H200 with 16 slots of ranks 8 to 64 in a batch of 12,800 tokens at 1.1B. Microseconds
of a call before / after; in brackets those for the bytes that it must move (docs/log.md, 2026-11-26):

    kernel           q k v           o              gate up         down             what changed
    _up_backward     77 / 58 (15)    50 / 42 (12)   215 / 166 (67)  50 / 42 (12)     turns, in the order of slots; 3
                                                                                     stages for 4
    _down_backward   134 / 121 (37)  83 / 58 (37)   115 / 68 (37)   157 / 150 (101)  64 columns for 32 where there are
                                                                                     at most two layers

With a single slot, `_down_backward` over all tokens in one program took 16-18 us a call, split by tokens 10.8
(docs/log.md, 2026-11-23).
"""

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.triton.launch import MANY_SLOTS, launch, wait_for_previous
from orchestrator.training.fast.ops.triton.lora_common import (
    accumulate_or_store,
    column_ranges,
    dropout_fields,
    is_kept,
    is_last_split,
    layer_factors,
    layer_key,
    locate_block,
    lora_kernel,
    module_ids,
    new_workspace,
    num_column_blocks,
    pick,
    rank_variants,
    reduce_split_k,
    semaphores_on,
    takes_variant,
    token_words,
)
from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch


def lora_backward(
    dy: torch.Tensor, x: torch.Tensor, lora_hidden: torch.Tensor, dx: torch.Tensor,
    adapters: Adapters, group: LayerGroup, batch: FlatBatch,
) -> None:  # fmt: skip
    dlora_hidden = _backward_of_up(dy, lora_hidden, adapters, group, batch)
    _backward_of_down(dlora_hidden, x, dx, adapters, group, batch)


def _backward_of_up(
    dy: torch.Tensor, lora_hidden: torch.Tensor, adapters: Adapters, group: LayerGroup, batch: FlatBatch
) -> torch.Tensor:
    """Add to the gradient of B, and return `dlora_hidden` (T, layers * R)."""
    num_layers, num_tiles, options = len(group.layers), len(batch.tile_slots), _up_backward_options(adapters)
    splits, dlora_hidden = 4, torch.empty_like(lora_hidden)
    num_sums = num_column_blocks(group, options["BLOCK_N"]) * adapters.num_slots
    launch(_up_backward, (num_tiles * num_layers * splits + num_sums,),
        dy, lora_hidden, dlora_hidden, new_workspace(lora_hidden, splits), semaphores_on(lora_hidden.device),
        adapters.b(group, adapters.weights), adapters.b(group, adapters.gradients), batch.tile_slots,
        batch.table["first_tile"], batch.table["end_tile"], batch.table["scale"], layer_factors(adapters, group),
        batch.table["rank"], num_tiles, adapters.num_slots, adapters.weights.stride(0), dy.stride(0),
        *column_ranges(group), SPLITS=splits, LAYERS=num_layers, RANK=adapters.rank,
        RANK_VARIANTS=rank_variants(adapters), TILE=batch.tile, **options,
    )  # fmt: skip
    return dlora_hidden


def _backward_of_down(
    dlora_hidden: torch.Tensor, x: torch.Tensor, dx: torch.Tensor,
    adapters: Adapters, group: LayerGroup, batch: FlatBatch,
) -> None:  # fmt: skip
    """Add to the gradients of A and x."""
    num_layers, da = len(group.layers), adapters.a(group, adapters.gradients)
    options = _down_backward_options(adapters, group)
    blocks = triton.cdiv(group.in_features, options["BLOCK_K"])
    splits = 1 if adapters.num_slots >= MANY_SLOTS else _token_splits(blocks * adapters.num_slots, num_layers)
    launch(_down_backward, (blocks, splits, adapters.num_slots),
        x, dlora_hidden, dx, adapters.a(group, adapters.weights), da, new_workspace(da, splits),
        semaphores_on(x.device), batch.table["first_tile"], batch.table["end_tile"], batch.dropout_positions,
        *dropout_fields(batch), batch.table["rank"], adapters.num_slots, adapters.weights.stride(0),
        group.in_features, *module_ids(group), SPLITS=splits, LAYERS=num_layers, RANK=adapters.rank,
        RANK_VARIANTS=rank_variants(adapters), TILE=batch.tile, **options,
    )  # fmt: skip


def _token_splits(programs: int, num_layers: int) -> int:
    """Return how many programs share a sum over tokens."""
    return max(1, min(6 if num_layers == 2 else 4, 1024 // programs))


def _up_backward_options(adapters: Adapters) -> dict[str, int]:
    block, stages = 128 if adapters.rank <= 32 else 64, 3 if adapters.num_slots >= MANY_SLOTS else 4
    if adapters.rank > 64:
        return {"BLOCK_N": block, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": block, "num_warps": 4, "num_stages": stages}


def _down_backward_options(adapters: Adapters, group: LayerGroup) -> dict[str, int]:
    if adapters.rank > 64:
        return {"BLOCK_K": 32 if adapters.rank <= 128 else 16, "num_warps": 8, "num_stages": 1}
    many_slots = adapters.num_slots >= MANY_SLOTS
    is_wide = len(group.layers) < 3 if many_slots else len(group.layers) == 1 and group.in_features >= 4096
    return {"BLOCK_K": 64 if is_wide else 32, "num_warps": 4, "num_stages": 3}


@lora_kernel
def _up_backward(
    dy, lora_hidden, dlora_hidden, split_k_workspace, split_k_semaphores, b, db, tile_slots, first_tiles, end_tiles,
    scales, factors, slot_ranks, num_tiles, num_slots, slot_stride, y_stride, column0, width0, column1, width1,
    column2, width2,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, RANK_VARIANTS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    num_sums = num_programs - num_tiles * LAYERS * SPLITS
    # Both kinds of programs in turn, in the order of slots: the dy that one has read the other finds in the L2 cache.
    index = (program.to(tl.int64) * num_sums // num_programs).to(tl.int32)
    if ((program + 1).to(tl.int64) * num_sums // num_programs).to(tl.int32) > index:
        num_blocks = num_sums // num_slots
        slot, block = index // num_blocks, index % num_blocks
        first, last = tl.load(first_tiles + slot), tl.load(end_tiles + slot)
        if first < last:
            layer, start, b_row, column, width = locate_block(
                block, column0, width0, column1, width1, column2, width2, BLOCK_N
            )
            columns, rank = start + tl.arange(0, BLOCK_N), tl.load(slot_ranks + slot)
            rows = db + slot.to(tl.int64) * slot_stride + (b_row + columns)[:, None] * RANK
            inside = columns[:, None] < width
            for variant in tl.static_range(RANK_VARIANTS):
                if takes_variant(rank, RANK >> variant, variant + 1 == RANK_VARIANTS):
                    total = _db(
                        dy + column, lora_hidden + layer * RANK, columns, first, last, y_stride, LAYERS * RANK, width,
                        RANK >> variant, TILE,
                    )  # fmt: skip
                    at = rows + tl.arange(0, RANK >> variant)[None, :]
                    scale = tl.load(scales + slot) * tl.load(factors + layer * num_slots + slot)
                    tl.store(at, tl.load(at, mask=inside) + total * scale, mask=inside)
    else:
        program -= index
        split, layer, tile = program % SPLITS, program // SPLITS % LAYERS, program // (SPLITS * LAYERS)
        slot = tl.load(tile_slots + tile)
        width, column = pick(layer, width0, width1, width2), pick(layer, column0, column1, column2)
        b += slot.to(tl.int64) * slot_stride + pick(layer, 0, width0, width0 + width1) * RANK
        tokens = tile * TILE + tl.arange(0, TILE)
        rank = tl.load(slot_ranks + slot)
        for variant in tl.static_range(RANK_VARIANTS):
            if takes_variant(rank, RANK >> variant, variant + 1 == RANK_VARIANTS):
                total = _dlora_hidden(
                    dy + column, b, tokens, split, y_stride, width, RANK, RANK >> variant, SPLITS, BLOCK_N
                )
                total *= tl.load(scales + slot) * tl.load(factors + layer * num_slots + slot)
                reduce_split_k(
                    total, dlora_hidden, split_k_workspace, split_k_semaphores, tokens, tile, layer, split,
                    num_tiles, LAYERS, RANK, SPLITS,
                )  # fmt: skip


@triton.jit
def _dlora_hidden(
    dy, b, tokens, split, y_stride, width,
    RANK: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return a split's part of dy B, (tokens, R) float32: a sum over columns."""
    ranks = tl.arange(0, R)
    per_split = tl.cdiv(tl.cdiv(width, BLOCK_N), SPLITS) * BLOCK_N
    total = tl.zeros((tokens.shape[0], R), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, width), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < width
        values = tl.load(dy + tokens[:, None] * y_stride + columns[None, :], mask=inside[None, :], other=0.0)
        weights = tl.load(b + columns[:, None] * RANK + ranks[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(values, weights.to(values.dtype), total, input_precision="ieee")
    return total


@triton.jit
def _db(
    dy, lora_hidden, columns, first, last, y_stride, hidden_stride, width, R: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return dy^T lora_hidden for some rows of B, (columns, R) float32: a sum over the tiles of a slot."""
    ranks = tl.arange(0, R)
    total = tl.zeros((columns.shape[0], R), tl.float32)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        at = dy + tokens[:, None] * y_stride + columns[None, :]
        values = tl.load(at, mask=columns[None, :] < width, other=0.0)
        hidden = tl.load(lora_hidden + tokens[:, None] * hidden_stride + ranks[None, :])
        total = tl.dot(values.T, hidden, total, input_precision="ieee")
    return total


@lora_kernel
def _down_backward(
    x, dlora_hidden, dx, a, da, split_k_workspace, split_k_semaphores, first_tiles, end_tiles, dropout_positions, keys,
    thresholds, keep_scales, slot_ranks, num_slots, slot_stride, in_features, module_id0, module_id1, module_id2,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, RANK_VARIANTS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    block, split, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(first_tiles + slot), tl.load(end_tiles + slot)
    if first < last:
        per_split = tl.cdiv(last - first, SPLITS)
        first = first + split * per_split
        last = tl.minimum(first + per_split, last)
        a += slot.to(tl.int64) * slot_stride
        da += slot.to(tl.int64) * slot_stride
        size: tl.constexpr = LAYERS * RANK
        split_k_workspace += slot * size * in_features
        part = split_k_workspace + split * num_slots * size * in_features
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        threshold, rank = tl.load(thresholds + slot), tl.load(slot_ranks + slot)
        key, keep_scale = tl.load(keys + slot), tl.load(keep_scales + slot)
        key0, key1, key2 = layer_key(key, module_id0), layer_key(key, module_id1), layer_key(key, module_id2)
        semaphore = split_k_semaphores + slot * tl.num_programs(0) + block
        for variant in tl.static_range(RANK_VARIANTS):
            if takes_variant(rank, RANK >> variant, variant + 1 == RANK_VARIANTS):
                if threshold == 0:
                    _dx_da(
                        x, dlora_hidden, dx, a, da, part, dropout_positions, first, last, columns, in_features,
                        key0, key1, key2, threshold, 1.0, SPLITS, LAYERS, RANK, RANK >> variant, TILE, False,
                    )  # fmt: skip
                else:
                    _dx_da(
                        x, dlora_hidden, dx, a, da, part, dropout_positions, first, last, columns, in_features,
                        key0, key1, key2, threshold, keep_scale, SPLITS, LAYERS, RANK, RANK >> variant, TILE, True,
                    )  # fmt: skip
                if SPLITS > 1:
                    _reduce_da(
                        da, split_k_workspace, semaphore, num_slots * size * in_features, columns, in_features,
                        SPLITS, LAYERS, RANK, RANK >> variant,
                    )  # fmt: skip


@triton.jit
def _reduce_da(
    da, split_k_workspace, semaphore, size, columns, in_features,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Add the parts of all splits to da at some features; the last program to finish does it."""
    if is_last_split(semaphore, SPLITS):
        inside = columns[None, :] < in_features
        for layer in tl.static_range(LAYERS):
            at = (layer * RANK + tl.arange(0, R)[:, None]) * in_features + columns[None, :]
            total = tl.load(da + at, mask=inside)
            for each in tl.static_range(SPLITS):
                total += tl.load(split_k_workspace + each * size + at, mask=inside, cache_modifier=".cg")
            tl.store(da + at, total, mask=inside)


@triton.jit
def _dx_da(
    x, dlora_hidden, dx, a, da, part, dropout_positions, first, last, columns, in_features,
    key0, key1, key2, threshold, keep_scale,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add to dx at some tiles and features, and add or store the sum of these tiles in da."""
    inside = columns[None, :] < in_features
    at = tl.arange(0, R)[:, None] * in_features + columns[None, :]
    total0 = tl.zeros(at.shape, tl.float32)
    total1, total2 = total0, total0
    dtype = x.dtype.element_ty
    weights0 = tl.load(a + at, mask=inside, other=0.0).to(dtype)
    weights1, weights2 = weights0, weights0
    if LAYERS > 1:
        weights1 = tl.load(a + RANK * in_features + at, mask=inside, other=0.0).to(dtype)
    if LAYERS > 2:
        weights2 = tl.load(a + 2 * RANK * in_features + at, mask=inside, other=0.0).to(dtype)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        places = tokens[:, None] * in_features + columns[None, :]
        values = tl.load(x + places, mask=inside, other=0.0)
        before = tl.load(dx + places, mask=inside, other=0.0)
        positions = tl.load(dropout_positions + tokens)
        hidden_at = dlora_hidden + tokens[:, None] * (LAYERS * RANK) + tl.arange(0, R)[None, :]
        added = tl.zeros(values.shape, tl.float32)
        total0, added = _dx_da_of_layer(
            values, weights0, total0, added, hidden_at, key0, positions, columns, threshold, HAS_DROPOUT
        )
        if LAYERS > 1:
            total1, added = _dx_da_of_layer(
                values, weights1, total1, added, hidden_at + RANK, key1, positions, columns, threshold, HAS_DROPOUT
            )
        if LAYERS > 2:
            total2, added = _dx_da_of_layer(
                values, weights2, total2, added, hidden_at + 2 * RANK, key2, positions, columns, threshold, HAS_DROPOUT
            )
        tl.store(dx + places, (before + added * keep_scale).to(values.dtype), mask=inside)
    accumulate_or_store(total0 * keep_scale, da + at, part + at, inside, SPLITS)
    at += RANK * in_features
    if LAYERS > 1:
        accumulate_or_store(total1 * keep_scale, da + at, part + at, inside, SPLITS)
    at += RANK * in_features
    if LAYERS > 2:
        accumulate_or_store(total2 * keep_scale, da + at, part + at, inside, SPLITS)


@triton.jit
def _dx_da_of_layer(
    values, weights, total, added, hidden_at, key, positions, columns, threshold, HAS_DROPOUT: tl.constexpr
):  # fmt: skip
    """Add this tile to the sum of one layer's da (R, columns), and this layer to that of dx (tokens, columns)."""
    hidden = tl.load(hidden_at)
    back = tl.dot(hidden, weights, input_precision="ieee")
    if HAS_DROPOUT:
        # `always` is true and vanishes from the machine code. It binds the mask to the layout of `back`; without it the
        # compiler computes the hash twice, once in that layout and once in that of `values`.
        always = back.to(tl.int32, bitcast=True) >= -(2**31)
        kept = is_kept(token_words(key, positions), columns, threshold) & always
        values = tl.where(kept, values, 0.0)
        back = tl.where(kept, back, 0.0)
    return tl.dot(hidden.T, values, total, input_precision="ieee"), added + back
