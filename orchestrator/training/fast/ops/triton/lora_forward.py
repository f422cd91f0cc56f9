"""Stacked adapters in Triton, forward: one kernel for A and one for B, each for all layers of a group at once.

    _down   lora_hidden = keep_scale * dropout(x) A^T        grid (layers, SPLITS, tiles)

              x (T, in)                       A^T of the tile's slot (in, R)
              +-------+-------+-------+       +------+
      tile -> |split 0|split 1|  ...  |   x   |      |  -> workspace -> lora_hidden (T, layers * R)
              +-------+-------+-------+       +------+

    _up     y += scale * lora_hidden B^T                     grid (column blocks of all layers, tiles)

              lora_hidden (T, R)      B^T of the tile's slot (R, out)
              +------+                +-------+-------+
      tile -> |      |            x   |block 0|block 1| ...  -> y (T, out)
              +------+                +-------+-------+

Split K, rank variants and the arguments are described in `lora_common`. How many programs share a sum depends on the
model and the number of slots, not on the tokens: buckets share kernels. Launches of these kernels and of those in
`lora_backward` must follow one another, because they share their semaphores.

The sizes below were tuned on an H200 with 16 slots of ranks 8 to 64 in a batch of 12,800 tokens at 1.1B. Microseconds
of a call before / after; in brackets those for the bytes that it must move (docs/log.md, 2026-11-26). The figures of
`_up` are of another way to write the same sum:

    kernel   q k v          o              gate up          down           what changed
    _down    94 / 63 (12)   54 / 30 (12)   70 / 47 (12)     90 / 66 (34)   fewer splits (2 to 8 for 12); layers side by
                                                                           side in the grid; a cheaper mask
    _up      47 / 43 (31)   36 / 38 (25)   181 / 172 (137)  37 / 38 (25)   128 columns for 64
"""

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.triton.launch import MANY_SLOTS, launch, wait_for_previous
from orchestrator.training.fast.ops.triton.lora_common import (
    column_ranges,
    dropout_fields,
    is_kept,
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


def lora_down(x: torch.Tensor, adapters: Adapters, group: LayerGroup, batch: FlatBatch) -> torch.Tensor:
    num_layers, num_tiles, splits = len(group.layers), len(batch.tile_slots), _splits(adapters, group)
    lora_hidden = torch.empty(
        batch.num_tokens, num_layers * adapters.rank, dtype=adapters.compute_dtype, device=x.device
    )
    launch(_down, (num_layers, splits, num_tiles),
        x, adapters.a(group, adapters.weights), lora_hidden, new_workspace(lora_hidden, splits),
        semaphores_on(x.device), batch.tile_slots, batch.dropout_positions, *dropout_fields(batch),
        batch.table["rank"], adapters.weights.stride(0), group.in_features, *module_ids(group),
        RANK=adapters.rank, RANK_VARIANTS=rank_variants(adapters), SPLITS=splits, TILE=batch.tile,
        **_down_options(adapters),
    )  # fmt: skip
    return lora_hidden


def lora_up_(
    y: torch.Tensor, lora_hidden: torch.Tensor, adapters: Adapters, group: LayerGroup, batch: FlatBatch
) -> None:
    options = _up_options(adapters)
    launch(_up, (num_column_blocks(group, options["BLOCK_N"]), len(batch.tile_slots)),
        y, lora_hidden, adapters.b(group, adapters.weights), batch.tile_slots, batch.table["scale"],
        layer_factors(adapters, group), batch.table["rank"], adapters.num_slots, adapters.weights.stride(0),
        y.stride(0), lora_hidden.stride(0), *column_ranges(group),
        RANK=adapters.rank, RANK_VARIANTS=rank_variants(adapters), TILE=batch.tile, **options,
    )  # fmt: skip


def _splits(adapters: Adapters, group: LayerGroup) -> int:
    """Return how many programs share a sum over features."""
    if adapters.num_slots >= MANY_SLOTS:
        return max(2, min(group.in_features // 1024, 8))
    splits = 12 // len(group.layers)  # with some 700 tokens: one program for each multiprocessor of an H200
    if len(group.layers) > 1 and group.in_features >= 4096:
        splits *= 2
    return max(1, min(splits, group.in_features // 64))


def _down_options(adapters: Adapters) -> dict[str, int]:
    if adapters.rank > 64:
        return {"BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_K": 64, "num_warps": 4, "num_stages": 3 if adapters.num_slots >= MANY_SLOTS else 4}


def _up_options(adapters: Adapters) -> dict[str, int]:
    block = 128 if adapters.num_slots >= MANY_SLOTS and adapters.rank <= 64 else 64
    return {"BLOCK_N": block, "num_warps": 4 if adapters.rank <= 128 else 8, "num_stages": 1}


@lora_kernel
def _down(
    x, a, lora_hidden, split_k_workspace, split_k_semaphores, tile_slots, dropout_positions, keys, thresholds,
    keep_scales, slot_ranks, slot_stride, in_features, module_id0, module_id1, module_id2,
    RANK: tl.constexpr, RANK_VARIANTS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    # The layers are the fastest axis of the grid: they read the same features at the same time.
    layer, split, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tile_slots + tile)
    tokens = tile * TILE + tl.arange(0, TILE)
    a += slot.to(tl.int64) * slot_stride + layer * RANK * in_features
    per_split = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    first, last = split * per_split, tl.minimum((split + 1) * per_split, in_features)
    threshold, rank = tl.load(thresholds + slot), tl.load(slot_ranks + slot)
    key = layer_key(tl.load(keys + slot), pick(layer, module_id0, module_id1, module_id2))
    words = token_words(key, tl.load(dropout_positions + tokens))
    for variant in tl.static_range(RANK_VARIANTS):
        if takes_variant(rank, RANK >> variant, variant + 1 == RANK_VARIANTS):
            if threshold == 0:
                total = _down_sum(x, a, tokens, words, 0, first, last, in_features, RANK >> variant, BLOCK_K, False)
            else:
                total = _down_sum(
                    x, a, tokens, words, threshold, first, last, in_features, RANK >> variant, BLOCK_K, True
                )
                total *= tl.load(keep_scales + slot)
            reduce_split_k(
                total, lora_hidden, split_k_workspace, split_k_semaphores, tokens, tile, layer, split,
                tl.num_programs(2), tl.num_programs(0), RANK, SPLITS,
            )  # fmt: skip


@triton.jit
def _down_sum(
    x, a, tokens, words, threshold, first, last, in_features,
    R: tl.constexpr, BLOCK_K: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Return x A^T over the features from `first` to `last`: (tokens, R) float32."""
    total = tl.zeros((tokens.shape[0], R), tl.float32)
    ranks = tl.arange(0, R)
    for start in range(first, last, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns[None, :] < last
        values = tl.load(x + tokens[:, None] * in_features + columns[None, :], mask=inside, other=0.0)
        weights = tl.load(a + ranks[:, None] * in_features + columns[None, :], mask=inside, other=0.0)
        if HAS_DROPOUT:
            values = tl.where(is_kept(words, columns, threshold), values, 0.0)
        total = tl.dot(values, weights.to(values.dtype).T, total, input_precision="ieee")
    return total


@lora_kernel
def _up(
    y, lora_hidden, b, tile_slots, scales, factors, slot_ranks, num_slots, slot_stride, y_stride, hidden_stride,
    column0, width0, column1, width1, column2, width2,
    RANK: tl.constexpr, RANK_VARIANTS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    tile = tl.program_id(1)
    layer, start, b_row, column, width = locate_block(
        tl.program_id(0), column0, width0, column1, width1, column2, width2, BLOCK_N
    )
    slot = tl.load(tile_slots + tile)
    b += slot.to(tl.int64) * slot_stride
    tokens, rank = tile * TILE + tl.arange(0, TILE), tl.load(slot_ranks + slot)
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < width
    at = y + tokens[:, None] * y_stride + (column + columns)[None, :]
    values = tl.load(at, mask=inside[None, :])
    hidden_at = lora_hidden + tokens[:, None] * hidden_stride + layer * RANK
    weights_at = b + (b_row + columns)[:, None] * RANK
    # No value from outside is changed in the variants (`values = f(values)`): it would be carried through all of them,
    # which made this kernel a quarter slower (182 -> 231 us, docs/log.md, 2026-11-26).
    for variant in tl.static_range(RANK_VARIANTS):
        if takes_variant(rank, RANK >> variant, variant + 1 == RANK_VARIANTS):
            ranks = tl.arange(0, RANK >> variant)
            hidden = tl.load(hidden_at + ranks[None, :])
            weights = tl.load(weights_at + ranks[None, :], mask=inside[:, None], other=0.0)
            scale = tl.load(scales + slot) * tl.load(factors + layer * num_slots + slot)
            update = tl.dot(hidden, weights.to(hidden.dtype).T, input_precision="ieee") * scale
            tl.store(at, (values + update).to(values.dtype), mask=inside[None, :])
