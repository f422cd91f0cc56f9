"""Stacked adapters in Triton: four kernels, each for all layers of a group at once.

Sums are split among programs, so that the device is full: each leaves its part in float32 and takes a ticket, and the
one with the last ticket adds the parts up, always in the same order. Sums over tokens go over their slot's tiles alone.
How many share a sum depends on the model alone, not on the tokens: buckets share kernels.

Launches of these kernels must follow one another: they share their tickets.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.early import LAUNCH, after_previous
from orchestrator.training.fast.lora import Adapters, Group
from orchestrator.training.fast.lora_parts import (
    add_up,
    deliver,
    is_last,
    layer_key,
    layer_of,
    numbers_of,
    survives,
    third,
    tiles_of,
)
from orchestrator.training.fast.row import Row

MAX_LAYERS = 3
"""Of a group: queries, keys and values."""


def lora_down(x: torch.Tensor, adapters: Adapters, group: Group, row: Row) -> torch.Tensor:
    """dropout(x) A^T for each layer of the group, each with masks of its own: (T, in) -> (T, layers * rank)."""
    num_layers, num_tiles, splits = len(group.layers), len(row.tiles), _splits(group.in_features, len(group.layers))
    low = torch.empty(row.num_tokens, num_layers * adapters.rank, dtype=adapters.compute, device=x.device)
    _down[num_tiles, num_layers, splits](
        x, adapters.a(group, adapters.weights), low, _parts(low, splits), _tickets(x.device), row.tiles, row.counters,
        *_dropout(row), adapters.weights.stride(0), group.in_features, *_numbers(group),
        RANK=adapters.rank, SPLITS=splits, TILE=row.tile, **_down_options(adapters.rank), **LAUNCH,
    )  # fmt: skip
    return low


def lora_up_(y: torch.Tensor, low: torch.Tensor, adapters: Adapters, group: Group, row: Row) -> None:
    """y += scale * low B^T, in place, at the columns of the group's layers: (T, out)."""
    options = _up_options(adapters.rank)
    _up[_column_blocks(group, options["BLOCK_N"]), len(row.tiles)](
        y, low, adapters.b(group, adapters.weights), row.tiles, row.table["scale"], adapters.weights.stride(0),
        y.stride(0), low.stride(0), *_columns(group),
        RANK=adapters.rank, TILE=row.tile, **options, **LAUNCH,
    )  # fmt: skip


def lora_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    x_gradient: torch.Tensor,
    adapters: Adapters,
    group: Group,
    row: Row,
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
    gradient: torch.Tensor, low: torch.Tensor, adapters: Adapters, group: Group, row: Row
) -> torch.Tensor:
    """Add to the gradient of B, and return that of `low`: (T, layers * rank)."""
    num_layers, num_tiles, options = len(group.layers), len(row.tiles), _up_backward_options(adapters.rank)
    splits, by_low = 4, torch.empty_like(low)
    num_sums = _column_blocks(group, options["BLOCK_N"]) * adapters.num_slots
    _up_backward[num_tiles * num_layers * splits + num_sums,](
        gradient, low, by_low, _parts(low, splits), _tickets(low.device), adapters.b(group, adapters.weights),
        adapters.b(group, adapters.gradients), row.tiles, row.table["scale"], num_tiles, adapters.num_slots,
        adapters.weights.stride(0), gradient.stride(0), *_columns(group), SPLITS=splits,
        LAYERS=num_layers, RANK=adapters.rank, TILE=row.tile, **options, **LAUNCH,
    )  # fmt: skip
    return by_low


def _backward_to_x(
    by_low: torch.Tensor, x: torch.Tensor, x_gradient: torch.Tensor, adapters: Adapters, group: Group, row: Row
) -> None:
    """Add to the gradients of A and x."""
    num_layers, num_tiles, a_gradient = len(group.layers), len(row.tiles), adapters.a(group, adapters.gradients)
    options = _down_backward_options(adapters.rank, num_layers, group.in_features)
    blocks = triton.cdiv(group.in_features, options["BLOCK_K"])
    splits = _token_splits(blocks * adapters.num_slots, num_layers)
    _down_backward[blocks, splits, adapters.num_slots](
        x, by_low, x_gradient, adapters.a(group, adapters.weights), a_gradient, _parts(a_gradient, splits),
        _tickets(x.device), row.tiles, row.counters, *_dropout(row), num_tiles, adapters.num_slots,
        adapters.weights.stride(0), group.in_features, *_numbers(group), SPLITS=splits,
        LAYERS=num_layers, RANK=adapters.rank, TILE=row.tile, **options, **LAUNCH,
    )  # fmt: skip


def _splits(features: int, num_layers: int) -> int:
    """Programs that share a sum over features."""
    splits = 12 // num_layers  # with the tiles of some 700 tokens, one program for each multiprocessor of an H200
    if num_layers > 1 and features >= 4096:
        splits *= 2
    return max(1, min(splits, features // 64))


def _token_splits(programs: int, num_layers: int) -> int:
    """Programs that share a sum over tokens."""
    return max(1, min(6 if num_layers == 2 else 4, 1024 // programs))


def _down_options(rank: int) -> dict[str, int]:
    narrow = rank <= 64
    return {"BLOCK_K": 64, "num_warps": 4 if narrow else 8, "num_stages": 4 if narrow else 2}


def _up_options(rank: int) -> dict[str, int]:
    return {"BLOCK_N": 64, "num_warps": 4 if rank <= 128 else 8, "num_stages": 1}


def _up_backward_options(rank: int) -> dict[str, int]:
    narrow = rank <= 64
    return {"BLOCK_N": 128 if rank <= 32 else 64, "num_warps": 4 if narrow else 8, "num_stages": 4 if narrow else 2}


def _down_backward_options(rank: int, num_layers: int, features: int) -> dict[str, int]:
    block = 64 if num_layers == 1 and features >= 4096 and rank <= 64 else 32 if rank <= 128 else 16
    return {"BLOCK_K": block, "num_warps": 4 if rank <= 64 else 8, "num_stages": 3 if rank <= 64 else 1}


def _parts(whole: torch.Tensor, splits: int) -> torch.Tensor:
    return torch.empty((splits, *whole.shape) if splits > 1 else 1, dtype=torch.float32, device=whole.device)


@cache
def _tickets(device: torch.device) -> torch.Tensor:
    """Counters that each kernel finds and leaves at zero."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def _dropout(row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return row.table["key"], row.table["threshold"], row.table["keep_scale"]


def _numbers(group: Group) -> list[int]:
    """Of each layer, what its masks count by."""
    return [layer.number for layer in group.layers] + [0] * (MAX_LAYERS - len(group.layers))


def _columns(group: Group) -> list[int]:
    """Of each layer, the first column and the number of columns of its output."""
    places = [value for layer in group.layers for value in (layer.column, layer.width)]
    return places + [0] * (2 * MAX_LAYERS - len(places))


def _column_blocks(group: Group, block: int) -> int:
    return sum(triton.cdiv(layer.width, block) for layer in group.layers)


_kernel: Any = triton.jit(
    do_not_specialize=[
        "keys", "thresholds", "keep_scales", "scales", "num_tiles", "number0", "number1", "number2"
    ]
)  # fmt: skip
# What differs between layers and buckets makes no kernels of its own, nor does a table's place in its buffer.


@_kernel
def _down(
    x, a, low, parts, tickets, tiles, counters, keys, thresholds, keep_scales, stride, features,
    number0, number1, number2,
    RANK: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    after_previous()
    tile, layer, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles + tile)
    tokens = tile * TILE + tl.arange(0, TILE)
    a += slot.to(tl.int64) * stride + layer * RANK * features
    per_split = tl.cdiv(tl.cdiv(features, BLOCK_K), SPLITS) * BLOCK_K
    first, last = split * per_split, tl.minimum((split + 1) * per_split, features)
    threshold = tl.load(thresholds + slot)
    if threshold == 0:
        total = _down_sum(x, a, tokens, tokens, 0, 0, first, last, features, RANK, BLOCK_K, False)
    else:
        key = layer_key(tl.load(keys + slot), third(layer, number0, number1, number2))
        count = tl.load(counters + tokens)
        total = _down_sum(x, a, tokens, count, key, threshold, first, last, features, RANK, BLOCK_K, True)
        total *= tl.load(keep_scales + slot)
    add_up(total, low, parts, tickets, tokens, tile, layer, split, tl.num_programs(0), tl.num_programs(1), SPLITS)


@triton.jit
def _down_sum(
    x, a, tokens, count, key, threshold, first, last, features,
    RANK: tl.constexpr, BLOCK_K: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((tokens.shape[0], RANK), tl.float32)
    ranks = tl.arange(0, RANK)
    for start in range(first, last, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns[None, :] < last
        values = tl.load(x + tokens[:, None] * features + columns[None, :], mask=inside, other=0.0)
        weights = tl.load(a + ranks[:, None] * features + columns[None, :], mask=inside, other=0.0)
        if DROPS:
            values = tl.where(survives(key, numbers_of(count, columns, features), threshold), values, 0.0)
        total = tl.dot(values, weights.to(values.dtype).T, total, input_precision="ieee")
    return total


@_kernel
def _up(
    y, low, b, tiles, scales, stride, y_stride, low_stride, column0, width0, column1, width1, column2, width2,
    RANK: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    after_previous()
    tile = tl.program_id(1)
    layer, start, row, column, width = layer_of(
        tl.program_id(0), column0, width0, column1, width1, column2, width2, BLOCK_N
    )
    slot = tl.load(tiles + tile)
    b += slot.to(tl.int64) * stride
    tokens, ranks = tile * TILE + tl.arange(0, TILE), tl.arange(0, RANK)
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < width
    at = y + tokens[:, None] * y_stride + (column + columns)[None, :]
    values = tl.load(at, mask=inside[None, :])
    lows = tl.load(low + tokens[:, None] * low_stride + layer * RANK + ranks[None, :])
    weights = tl.load(b + (row + columns)[:, None] * RANK + ranks[None, :], mask=inside[:, None], other=0.0)
    ups = tl.dot(lows, weights.to(lows.dtype).T, input_precision="ieee") * tl.load(scales + slot)
    tl.store(at, (values + ups).to(values.dtype), mask=inside[None, :])


@_kernel
def _up_backward(
    gradient, low, by_low, parts, tickets, b, b_gradient, tiles, scales, num_tiles, num_slots, stride, y_stride,
    column0, width0, column1, width1, column2, width2,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    after_previous()
    program, num_sums = tl.program_id(0), tl.num_programs(0) - num_tiles * LAYERS * SPLITS
    if program < num_sums:  # first, since they take longest
        slot, block = program % num_slots, program // num_slots
        first, last = tiles_of(slot, tiles, num_tiles, num_slots)
        if first < last:
            layer, start, row, column, width = layer_of(
                block, column0, width0, column1, width1, column2, width2, BLOCK_N
            )
            columns, ranks = start + tl.arange(0, BLOCK_N), tl.arange(0, RANK)
            total = _b_gradient(
                gradient + column, low + layer * RANK, columns, first, last, y_stride, width, LAYERS, RANK, TILE
            )
            at = b_gradient + slot.to(tl.int64) * stride + (row + columns)[:, None] * RANK + ranks[None, :]
            inside = columns[:, None] < width
            tl.store(at, tl.load(at, mask=inside) + total * tl.load(scales + slot), mask=inside)
    else:
        program -= num_sums
        split, layer, tile = program % SPLITS, program // SPLITS % LAYERS, program // (SPLITS * LAYERS)
        slot = tl.load(tiles + tile)
        width, column = third(layer, width0, width1, width2), third(layer, column0, column1, column2)
        b += slot.to(tl.int64) * stride + third(layer, 0, width0, width0 + width1) * RANK
        tokens = tile * TILE + tl.arange(0, TILE)
        total = _low_gradient(gradient + column, b, tokens, split, y_stride, width, RANK, SPLITS, BLOCK_N)
        total *= tl.load(scales + slot)
        add_up(total, by_low, parts, tickets, tokens, tile, layer, split, num_tiles, LAYERS, SPLITS)


@triton.jit
def _low_gradient(
    gradient, b, tokens, split, y_stride, width, RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A split's part of the gradient of `low`, (tokens, rank): a sum over columns."""
    ranks = tl.arange(0, RANK)
    per_split = tl.cdiv(tl.cdiv(width, BLOCK_N), SPLITS) * BLOCK_N
    total = tl.zeros((tokens.shape[0], RANK), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, width), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < width
        values = tl.load(gradient + tokens[:, None] * y_stride + columns[None, :], mask=inside[None, :], other=0.0)
        weights = tl.load(b + columns[:, None] * RANK + ranks[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(values, weights.to(values.dtype), total, input_precision="ieee")
    return total


@triton.jit
def _b_gradient(
    gradient, low, columns, first, last, y_stride, width, LAYERS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The gradient of some rows of B, (columns, rank): a sum over a slot's tokens."""
    ranks = tl.arange(0, RANK)
    total = tl.zeros((columns.shape[0], RANK), tl.float32)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        at = gradient + tokens[:, None] * y_stride + columns[None, :]
        values = tl.load(at, mask=columns[None, :] < width, other=0.0)
        lows = tl.load(low + tokens[:, None] * (LAYERS * RANK) + ranks[None, :])
        total = tl.dot(values.T, lows, total, input_precision="ieee")
    return total


@_kernel
def _down_backward(
    x, by_low, x_gradient, a, a_gradient, parts, tickets, tiles, counters, keys, thresholds, keep_scales,
    num_tiles, num_slots, stride, features, number0, number1, number2,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    after_previous()
    block, split, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tiles_of(slot, tiles, num_tiles, num_slots)
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
        key, threshold, keep_scale = tl.load(keys + slot), tl.load(thresholds + slot), tl.load(keep_scales + slot)
        key0, key1, key2 = layer_key(key, number0), layer_key(key, number1), layer_key(key, number2)
        if threshold == 0:
            _through(
                x, by_low, x_gradient, a, a_gradient, part, counters, first, last, columns, features,
                key0, key1, key2, threshold, 1.0, SPLITS, LAYERS, RANK, TILE, False,
            )  # fmt: skip
        else:
            _through(
                x, by_low, x_gradient, a, a_gradient, part, counters, first, last, columns, features,
                key0, key1, key2, threshold, keep_scale, SPLITS, LAYERS, RANK, TILE, True,
            )  # fmt: skip
        if SPLITS > 1:  # noqa: SIM102
            if is_last(tickets + slot * tl.num_programs(0) + block, SPLITS):
                inside = columns[None, :] < features
                for layer in tl.static_range(LAYERS):
                    at = (layer * RANK + tl.arange(0, RANK)[:, None]) * features + columns[None, :]
                    total = tl.load(a_gradient + at, mask=inside)
                    for each in tl.static_range(SPLITS):
                        at_part = parts + each * num_slots * size * features + at
                        total += tl.load(at_part, mask=inside, cache_modifier=".cg")
                    tl.store(a_gradient + at, total, mask=inside)


@triton.jit
def _through(
    x, by_low, x_gradient, a, a_gradient, part, counters, first, last, columns, features,
    key0, key1, key2, threshold, keep_scale,
    SPLITS: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """The gradient of x at some tiles and features, and the part of theirs in that of A."""
    inside = columns[None, :] < features
    at = tl.arange(0, RANK)[:, None] * features + columns[None, :]
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
        numbers = numbers_of(tl.load(counters + tokens), columns, features)
        lows = by_low + tokens[:, None] * (LAYERS * RANK) + tl.arange(0, RANK)[None, :]
        by_x = tl.zeros(values.shape, tl.float32)
        total0, by_x = _through_layer(values, weights0, total0, by_x, lows, key0, numbers, threshold, DROPS)
        if LAYERS > 1:
            total1, by_x = _through_layer(values, weights1, total1, by_x, lows + RANK, key1, numbers, threshold, DROPS)
        if LAYERS > 2:
            lows += 2 * RANK
            total2, by_x = _through_layer(values, weights2, total2, by_x, lows, key2, numbers, threshold, DROPS)
        tl.store(x_gradient + places, (before + by_x * keep_scale).to(values.dtype), mask=inside)
    deliver(total0 * keep_scale, a_gradient + at, part + at, inside, SPLITS)
    at += RANK * features
    if LAYERS > 1:
        deliver(total1 * keep_scale, a_gradient + at, part + at, inside, SPLITS)
    at += RANK * features
    if LAYERS > 2:
        deliver(total2 * keep_scale, a_gradient + at, part + at, inside, SPLITS)


@triton.jit
def _through_layer(values, weights, total, by_x, lows, key, numbers, threshold, DROPS: tl.constexpr):
    low = tl.load(lows)
    back = tl.dot(low, weights, input_precision="ieee")
    if DROPS:
        # Always true, and gone in the machine code; but it binds the mask to the layout of `back`. Without it the
        # compiler hashes twice, once in that layout and once in that of `values`.
        always = back.to(tl.int32, bitcast=True) >= -(2**31)
        kept = survives(key, numbers, threshold) & always
        values = tl.where(kept, values, 0.0)
        back = tl.where(kept, back, 0.0)
    return tl.dot(low.T, values, total, input_precision="ieee"), by_x + back
