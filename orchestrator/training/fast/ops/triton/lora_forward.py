"""Stacked adapters in Triton, forward: a kernel for A and one for B, each for all layers of a group at once.

Sums are split among programs, so that the device is full: each leaves its part in float32 and takes a ticket, and the
one with the last ticket adds the parts up, always in the same order. Sums over tokens go over their slot's tiles alone.
How many share a sum depends on the model alone, not on the tokens: buckets share kernels.

A pack's kernels have a path for the stack's rank, one for a half and one for a quarter of it. A slot takes the
narrowest that holds its own: what lies beyond is neither read nor written, in `low` and its gradient either.

Launches of these kernels and those of `lora_backward_kernels` must follow one another: they share their tickets.
"""

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.triton.launch import FULL, after_previous, launch
from orchestrator.training.fast.ops.triton.lora_common import (
    add_up,
    column_blocks,
    columns_of,
    dropout,
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


def lora_down(x: torch.Tensor, adapters: Adapters, group: LayerGroup, row: FlatBatch) -> torch.Tensor:
    """dropout(x) A^T for each layer of the group, each with masks of its own: (T, in) -> (T, layers * rank)."""
    num_layers, num_tiles, splits = len(group.layers), len(row.tiles), _splits(adapters, group)
    low = torch.empty(row.num_tokens, num_layers * adapters.rank, dtype=adapters.compute, device=x.device)
    launch(_down, (num_layers, splits, num_tiles),
        x, adapters.a(group, adapters.weights), low, parts_of(low, splits), tickets_of(x.device), row.tiles,
        row.counters, *dropout(row), row.table["rank"], adapters.weights.stride(0), group.in_features, *numbers(group),
        RANK=adapters.rank, PATHS=paths(adapters), SPLITS=splits, TILE=row.tile, **_down_options(adapters),
    )  # fmt: skip
    return low


def lora_up_(y: torch.Tensor, low: torch.Tensor, adapters: Adapters, group: LayerGroup, row: FlatBatch) -> None:
    """y += scale * low B^T, in place, at the columns of the group's layers: (T, out)."""
    options = _up_options(adapters)
    launch(_up, (column_blocks(group, options["BLOCK_N"]), len(row.tiles)),
        y, low, adapters.b(group, adapters.weights), row.tiles, row.table["scale"], row.table["rank"],
        adapters.weights.stride(0), y.stride(0), low.stride(0), *columns_of(group),
        RANK=adapters.rank, PATHS=paths(adapters), TILE=row.tile, **options,
    )  # fmt: skip


def _splits(adapters: Adapters, group: LayerGroup) -> int:
    """Programs that share a sum over features."""
    if adapters.num_slots >= FULL:
        return max(2, min(group.in_features // 1024, 8))
    splits = 12 // len(group.layers)  # of some 700 tokens: one program for each multiprocessor of an H200
    if len(group.layers) > 1 and group.in_features >= 4096:
        splits *= 2
    return max(1, min(splits, group.in_features // 64))


def _down_options(adapters: Adapters) -> dict[str, int]:
    if adapters.rank > 64:
        return {"BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_K": 64, "num_warps": 4, "num_stages": 3 if adapters.num_slots >= FULL else 4}


def _up_options(adapters: Adapters) -> dict[str, int]:
    block = 128 if adapters.num_slots >= FULL and adapters.rank <= 64 else 64
    return {"BLOCK_N": block, "num_warps": 4 if adapters.rank <= 128 else 8, "num_stages": 1}


@kernel
def _down(
    x, a, low, parts, tickets, tiles, counters, keys, thresholds, keep_scales, slot_ranks, stride,
    features, number0, number1, number2,
    RANK: tl.constexpr, PATHS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    after_previous()
    layer, split, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # layers read the same features at once
    slot = tl.load(tiles + tile)
    tokens = tile * TILE + tl.arange(0, TILE)
    a += slot.to(tl.int64) * stride + layer * RANK * features
    per_split = tl.cdiv(tl.cdiv(features, BLOCK_K), SPLITS) * BLOCK_K
    first, last = split * per_split, tl.minimum((split + 1) * per_split, features)
    threshold, rank = tl.load(thresholds + slot), tl.load(slot_ranks + slot)
    key = layer_key(tl.load(keys + slot), third(layer, number0, number1, number2))
    words = words_of(key, tl.load(counters + tokens))
    for path in tl.static_range(PATHS):
        if takes(rank, RANK >> path, path + 1 == PATHS):
            if threshold == 0:
                total = _down_sum(x, a, tokens, words, 0, first, last, features, RANK >> path, BLOCK_K, False)
            else:
                total = _down_sum(x, a, tokens, words, threshold, first, last, features, RANK >> path, BLOCK_K, True)
                total *= tl.load(keep_scales + slot)
            add_up(
                total, low, parts, tickets, tokens, tile, layer, split, tl.num_programs(2), tl.num_programs(0),
                RANK, SPLITS,
            )  # fmt: skip


@triton.jit
def _down_sum(
    x, a, tokens, words, threshold, first, last, features,
    R: tl.constexpr, BLOCK_K: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((tokens.shape[0], R), tl.float32)
    ranks = tl.arange(0, R)
    for start in range(first, last, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns[None, :] < last
        values = tl.load(x + tokens[:, None] * features + columns[None, :], mask=inside, other=0.0)
        weights = tl.load(a + ranks[:, None] * features + columns[None, :], mask=inside, other=0.0)
        if DROPS:
            values = tl.where(survives(words, columns, threshold), values, 0.0)
        total = tl.dot(values, weights.to(values.dtype).T, total, input_precision="ieee")
    return total


@kernel
def _up(
    y, low, b, tiles, scales, slot_ranks, stride, y_stride, low_stride,
    column0, width0, column1, width1, column2, width2,
    RANK: tl.constexpr, PATHS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    after_previous()
    tile = tl.program_id(1)
    layer, start, row, column, width = layer_of(
        tl.program_id(0), column0, width0, column1, width1, column2, width2, BLOCK_N
    )
    slot = tl.load(tiles + tile)
    b += slot.to(tl.int64) * stride
    tokens, rank = tile * TILE + tl.arange(0, TILE), tl.load(slot_ranks + slot)
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < width
    at = y + tokens[:, None] * y_stride + (column + columns)[None, :]
    values = tl.load(at, mask=inside[None, :])
    lows_at = low + tokens[:, None] * low_stride + layer * RANK
    weights_at = b + (row + columns)[:, None] * RANK
    for path in tl.static_range(PATHS):
        if takes(rank, RANK >> path, path + 1 == PATHS):
            ranks = tl.arange(0, RANK >> path)
            lows = tl.load(lows_at + ranks[None, :])
            weights = tl.load(weights_at + ranks[None, :], mask=inside[:, None], other=0.0)
            ups = tl.dot(lows, weights.to(lows.dtype).T, input_precision="ieee") * tl.load(scales + slot)
            tl.store(at, (values + ups).to(values.dtype), mask=inside[None, :])
