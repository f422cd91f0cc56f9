"""Stacked adapters in Triton, backward: two kernels, made as those of `lora_kernels`."""

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.triton.launch import FULL, after_previous, launch
from orchestrator.training.fast.ops.triton.lora_common import (
    add_up,
    column_blocks,
    columns_of,
    deliver,
    dropout,
    is_last,
    kernel,
    layer_key,
    layer_of,
    numbers,
    parts_of,
    paths,
    survives,
    takes,
    third,
    tickets_of,
    words_of,
)
from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch


def lora_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    x_gradient: torch.Tensor,
    adapters: Adapters,
    group: LayerGroup,
    row: FlatBatch,
) -> None:
    """Add to the gradients of A and B, and to that of x, in place.

    Args:
        gradient: (T, out) of the layers' output.
        x: (T, in) their input.
        low: (T, layers * rank) from `lora_down`.
        x_gradient: (T, in) what has come through the base.
    """
    by_low = _backward_to_low(gradient, low, adapters, group, row)
    _backward_to_x(by_low, x, x_gradient, adapters, group, row)


def _backward_to_low(
    gradient: torch.Tensor, low: torch.Tensor, adapters: Adapters, group: LayerGroup, row: FlatBatch
) -> torch.Tensor:
    """Add to the gradient of B, and return that of `low`: (T, layers * rank)."""
    num_layers, num_tiles, options = len(group.layers), len(row.tiles), _up_backward_options(adapters)
    splits, by_low = 4, torch.empty_like(low)
    num_sums = column_blocks(group, options["BLOCK_N"]) * adapters.num_slots
    launch(_up_backward, (num_tiles * num_layers * splits + num_sums,),
        gradient, low, by_low, parts_of(low, splits), tickets_of(low.device), adapters.b(group, adapters.weights),
        adapters.b(group, adapters.gradients), row.tiles, row.table["first_tile"], row.table["end_tile"],
        row.table["scale"], row.table["rank"], num_tiles, adapters.num_slots, adapters.weights.stride(0),
        gradient.stride(0), *columns_of(group), SPLITS=splits,
        LAYERS=num_layers, RANK=adapters.rank, PATHS=paths(adapters), TILE=row.tile, **options,
    )  # fmt: skip
    return by_low


def _backward_to_x(
    by_low: torch.Tensor,
    x: torch.Tensor,
    x_gradient: torch.Tensor,
    adapters: Adapters,
    group: LayerGroup,
    row: FlatBatch,
) -> None:
    """Add to the gradients of A and x."""
    num_layers, a_gradient = len(group.layers), adapters.a(group, adapters.gradients)
    options = _down_backward_options(adapters, group)
    blocks = triton.cdiv(group.in_features, options["BLOCK_K"])
    splits = 1 if adapters.num_slots >= FULL else _token_splits(blocks * adapters.num_slots, num_layers)
    launch(_down_backward, (blocks, splits, adapters.num_slots),
        x, by_low, x_gradient, adapters.a(group, adapters.weights), a_gradient, parts_of(a_gradient, splits),
        tickets_of(x.device), row.table["first_tile"], row.table["end_tile"], row.counters, *dropout(row),
        row.table["rank"], adapters.num_slots, adapters.weights.stride(0), group.in_features, *numbers(group),
        SPLITS=splits, LAYERS=num_layers, RANK=adapters.rank, PATHS=paths(adapters), TILE=row.tile, **options,
    )  # fmt: skip


def _token_splits(programs: int, num_layers: int) -> int:
    """Programs that share a sum over tokens."""
    return max(1, min(6 if num_layers == 2 else 4, 1024 // programs))


def _up_backward_options(adapters: Adapters) -> dict[str, int]:
    block, stages = 128 if adapters.rank <= 32 else 64, 3 if adapters.num_slots >= FULL else 4
    if adapters.rank > 64:
        return {"BLOCK_N": block, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": block, "num_warps": 4, "num_stages": stages}


def _down_backward_options(adapters: Adapters, group: LayerGroup) -> dict[str, int]:
    if adapters.rank > 64:
        return {"BLOCK_K": 32 if adapters.rank <= 128 else 16, "num_warps": 8, "num_stages": 1}
    full = adapters.num_slots >= FULL
    is_wide = len(group.layers) < 3 if full else len(group.layers) == 1 and group.in_features >= 4096
    return {"BLOCK_K": 64 if is_wide else 32, "num_warps": 4, "num_stages": 3}


@kernel
def _up_backward(
    gradient, low, by_low, parts, tickets, b, b_gradient, tiles, first_tiles, end_tiles, scales, slot_ranks,
    num_tiles, num_slots, stride, y_stride, column0, width0, column1, width1, column2, width2,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, PATHS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    after_previous()
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    num_sums = num_programs - num_tiles * LAYERS * SPLITS
    # Both kinds in turn, in the order of slots: what one has read of the gradient the other finds in the L2.
    index = (program.to(tl.int64) * num_sums // num_programs).to(tl.int32)
    if ((program + 1).to(tl.int64) * num_sums // num_programs).to(tl.int32) > index:
        num_blocks = num_sums // num_slots
        slot, block = index // num_blocks, index % num_blocks
        first, last = tl.load(first_tiles + slot), tl.load(end_tiles + slot)
        if first < last:
            layer, start, row, column, width = layer_of(
                block, column0, width0, column1, width1, column2, width2, BLOCK_N
            )
            columns, rank = start + tl.arange(0, BLOCK_N), tl.load(slot_ranks + slot)
            rows = b_gradient + slot.to(tl.int64) * stride + (row + columns)[:, None] * RANK
            inside = columns[:, None] < width
            for path in tl.static_range(PATHS):
                if takes(rank, RANK >> path, path + 1 == PATHS):
                    total = _b_gradient(
                        gradient + column, low + layer * RANK, columns, first, last, y_stride, LAYERS * RANK, width,
                        RANK >> path, TILE,
                    )  # fmt: skip
                    at = rows + tl.arange(0, RANK >> path)[None, :]
                    tl.store(at, tl.load(at, mask=inside) + total * tl.load(scales + slot), mask=inside)
    else:
        program -= index
        split, layer, tile = program % SPLITS, program // SPLITS % LAYERS, program // (SPLITS * LAYERS)
        slot = tl.load(tiles + tile)
        width, column = third(layer, width0, width1, width2), third(layer, column0, column1, column2)
        b += slot.to(tl.int64) * stride + third(layer, 0, width0, width0 + width1) * RANK
        tokens = tile * TILE + tl.arange(0, TILE)
        rank = tl.load(slot_ranks + slot)
        for path in tl.static_range(PATHS):
            if takes(rank, RANK >> path, path + 1 == PATHS):
                total = _low_gradient(
                    gradient + column, b, tokens, split, y_stride, width, RANK, RANK >> path, SPLITS, BLOCK_N
                )
                total *= tl.load(scales + slot)
                add_up(total, by_low, parts, tickets, tokens, tile, layer, split, num_tiles, LAYERS, RANK, SPLITS)


@triton.jit
def _low_gradient(
    gradient, b, tokens, split, y_stride, width,
    RANK: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A split's part of the gradient of `low`, (tokens, R): a sum over columns."""
    ranks = tl.arange(0, R)
    per_split = tl.cdiv(tl.cdiv(width, BLOCK_N), SPLITS) * BLOCK_N
    total = tl.zeros((tokens.shape[0], R), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, width), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < width
        values = tl.load(gradient + tokens[:, None] * y_stride + columns[None, :], mask=inside[None, :], other=0.0)
        weights = tl.load(b + columns[:, None] * RANK + ranks[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(values, weights.to(values.dtype), total, input_precision="ieee")
    return total


@triton.jit
def _b_gradient(
    gradient, low, columns, first, last, y_stride, low_stride, width, R: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The gradient of some rows of B, (columns, R): a sum over a slot's tokens."""
    ranks = tl.arange(0, R)
    total = tl.zeros((columns.shape[0], R), tl.float32)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        at = gradient + tokens[:, None] * y_stride + columns[None, :]
        values = tl.load(at, mask=columns[None, :] < width, other=0.0)
        lows = tl.load(low + tokens[:, None] * low_stride + ranks[None, :])
        total = tl.dot(values.T, lows, total, input_precision="ieee")
    return total


@kernel
def _down_backward(
    x, by_low, x_gradient, a, a_gradient, parts, tickets, first_tiles, end_tiles, counters, keys, thresholds,
    keep_scales, slot_ranks, num_slots, stride, features, number0, number1, number2,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, PATHS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    after_previous()
    block, split, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(first_tiles + slot), tl.load(end_tiles + slot)
    if first < last:
        per_split = tl.cdiv(last - first, SPLITS)
        first = first + split * per_split
        last = tl.minimum(first + per_split, last)
        a += slot.to(tl.int64) * stride
        a_gradient += slot.to(tl.int64) * stride
        size: tl.constexpr = LAYERS * RANK
        parts += slot * size * features
        part = parts + split * num_slots * size * features
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        threshold, rank = tl.load(thresholds + slot), tl.load(slot_ranks + slot)
        key, keep_scale = tl.load(keys + slot), tl.load(keep_scales + slot)
        key0, key1, key2 = layer_key(key, number0), layer_key(key, number1), layer_key(key, number2)
        ticket = tickets + slot * tl.num_programs(0) + block
        for path in tl.static_range(PATHS):
            if takes(rank, RANK >> path, path + 1 == PATHS):
                if threshold == 0:
                    _through(
                        x, by_low, x_gradient, a, a_gradient, part, counters, first, last, columns, features,
                        key0, key1, key2, threshold, 1.0, SPLITS, LAYERS, RANK, RANK >> path, TILE, False,
                    )  # fmt: skip
                else:
                    _through(
                        x, by_low, x_gradient, a, a_gradient, part, counters, first, last, columns, features,
                        key0, key1, key2, threshold, keep_scale, SPLITS, LAYERS, RANK, RANK >> path, TILE, True,
                    )  # fmt: skip
                if SPLITS > 1:
                    _add_up_a(
                        a_gradient, parts, ticket, num_slots * size * features, columns, features,
                        SPLITS, LAYERS, RANK, RANK >> path,
                    )  # fmt: skip


@triton.jit
def _add_up_a(
    a_gradient, parts, ticket, size, columns, features,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Add all splits' parts of the gradient of A at some features, once they are there."""
    if is_last(ticket, SPLITS):
        inside = columns[None, :] < features
        for layer in tl.static_range(LAYERS):
            at = (layer * RANK + tl.arange(0, R)[:, None]) * features + columns[None, :]
            total = tl.load(a_gradient + at, mask=inside)
            for each in tl.static_range(SPLITS):
                total += tl.load(parts + each * size + at, mask=inside, cache_modifier=".cg")
            tl.store(a_gradient + at, total, mask=inside)


@triton.jit
def _through(
    x, by_low, x_gradient, a, a_gradient, part, counters, first, last, columns, features,
    key0, key1, key2, threshold, keep_scale,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """The gradient of x at some tiles and features, and the part of theirs in that of A."""
    inside = columns[None, :] < features
    at = tl.arange(0, R)[:, None] * features + columns[None, :]
    total0 = tl.zeros(at.shape, tl.float32)
    total1, total2 = total0, total0
    compute = x.dtype.element_ty
    weights0 = tl.load(a + at, mask=inside, other=0.0).to(compute)
    weights1, weights2 = weights0, weights0
    if LAYERS > 1:
        weights1 = tl.load(a + RANK * features + at, mask=inside, other=0.0).to(compute)
    if LAYERS > 2:
        weights2 = tl.load(a + 2 * RANK * features + at, mask=inside, other=0.0).to(compute)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        places = tokens[:, None] * features + columns[None, :]
        values = tl.load(x + places, mask=inside, other=0.0)
        before = tl.load(x_gradient + places, mask=inside, other=0.0)
        count = tl.load(counters + tokens)
        lows = by_low + tokens[:, None] * (LAYERS * RANK) + tl.arange(0, R)[None, :]
        by_x = tl.zeros(values.shape, tl.float32)
        total0, by_x = _through_layer(values, weights0, total0, by_x, lows, key0, count, columns, threshold, DROPS)
        if LAYERS > 1:
            total1, by_x = _through_layer(
                values, weights1, total1, by_x, lows + RANK, key1, count, columns, threshold, DROPS
            )
        if LAYERS > 2:
            total2, by_x = _through_layer(
                values, weights2, total2, by_x, lows + 2 * RANK, key2, count, columns, threshold, DROPS
            )
        tl.store(x_gradient + places, (before + by_x * keep_scale).to(values.dtype), mask=inside)
    deliver(total0 * keep_scale, a_gradient + at, part + at, inside, SPLITS)
    at += RANK * features
    if LAYERS > 1:
        deliver(total1 * keep_scale, a_gradient + at, part + at, inside, SPLITS)
    at += RANK * features
    if LAYERS > 2:
        deliver(total2 * keep_scale, a_gradient + at, part + at, inside, SPLITS)


@triton.jit
def _through_layer(values, weights, total, by_x, lows, key, count, columns, threshold, DROPS: tl.constexpr):
    low = tl.load(lows)
    back = tl.dot(low, weights, input_precision="ieee")
    if DROPS:
        # Always true, and gone in the machine code; but it binds the mask to the layout of `back`. Without it the
        # compiler hashes twice, once in that layout and once in that of `values`.
        always = back.to(tl.int32, bitcast=True) >= -(2**31)
        kept = survives(words_of(key, count), columns, threshold) & always
        values = tl.where(kept, values, 0.0)
        back = tl.where(kept, back, 0.0)
    return tl.dot(low.T, values, total, input_precision="ieee"), by_x + back
