"""AdamW for all slots in two Triton kernels: squares of the gradient by block; then norm, clipping and step at once.

    weights, moments, gradients of a slot: one row of `size` elements

    _sum_squares   grid (row blocks, S)   | 8,192 | 8,192 | ... |  ->  block_squares (S, row blocks)
    _update        grid (row blocks, S)   each program adds up all of its slot's block_squares again, then steps 8,192
                                          elements

With moments in eight bits there are three, because a matrix has many more programs of 512 elements, too many to sum the
norm in each:

    _sum_squares -> _norms (grid S) -> _update_eight_bit   grid (EightBitMoments.programs, S)

        512 elements of one matrix: | block of 256, one absmax | block of 256, one absmax |

8,192 elements and 8 warps made AdamW 5.6 -> 4.9 ms a step with 16 slots at 1.1B (the bytes alone take 3.2 ms; with
1,024 elements it took 9.6). `_sum_squares` kept 4 warps, which was not timed alone (docs/log.md, 2026-11-26, H200). The
speed of `_update_eight_bit` is not known (same page).
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.eight_bit import CHUNK, EightBitMoments
from orchestrator.training.fast.ops.triton.launch import launch, wait_for_previous
from orchestrator.training.fast.sizes import SHARED, SMALL
from orchestrator.training.fast.step.adapters import BLOCK, Adapters
from orchestrator.training.fast.step.flat_batch import FlatBatch

_ELEMENTS = 8192
"""Weights that one program updates."""

_TABLE_FIELDS = (
    "applies",
    "learning_rate",
    "weight_decay",
    "one_minus_beta1",
    "one_minus_beta2",
    "epsilon",
    "bias_correction1",
    "bias_correction2",
    "max_norm",
)
"""Fields of `flat_batch.TABLE` in the order of the kernels' arguments."""


def update(adapters: Adapters, batch: FlatBatch) -> torch.Tensor:
    """Implement `Ops.update`. The norm of a slot whose batch goes on is 0."""
    size, table = adapters.weights.shape[1], batch.table
    blocks = triton.cdiv(size, _ELEMENTS)
    block_squares = torch.empty(adapters.num_slots, blocks, dtype=torch.float32, device=adapters.weights.device)
    norms = torch.empty(adapters.num_slots, dtype=torch.float32, device=adapters.weights.device)
    grid = (blocks, adapters.num_slots)
    # The step in eight bits clears the gradient within a slot's own rank only: what lies beyond must not count.
    eight_bit = adapters.eight_bit
    is_mixed = adapters.num_slots > 1 or eight_bit is not None
    launch(
        _sum_squares,
        grid,
        adapters.gradients,
        adapters.rank_layout,
        table["rank"],
        table["applies"],
        block_squares,
        size,
        blocks,
        ELEMENTS=_ELEMENTS,
        BLOCK=BLOCK,
        MIXED_RANKS=is_mixed,
    )
    if eight_bit is not None:
        launch(_norms, (adapters.num_slots,), block_squares, norms, table["applies"], blocks, BLOCK=BLOCK)
        _step_eight_bit(adapters, eight_bit, table, norms)
        return norms
    launch(
        _update,
        grid,
        adapters.weights,
        adapters.moment1,
        adapters.moment2,
        adapters.gradients,
        adapters.rank_layout,
        table["rank"],
        block_squares,
        norms,
        *(table[name] for name in _TABLE_FIELDS),
        size,
        blocks,
        ELEMENTS=_ELEMENTS,
        BLOCK=BLOCK,
        num_warps=8,
        MIXED_RANKS=is_mixed,
    )
    return norms


def _step_eight_bit(
    adapters: Adapters, eight_bit: EightBitMoments, table: Mapping[str, torch.Tensor], norms: torch.Tensor
) -> None:
    """Clip, step and clear the gradients of slots whose moments are in eight bits."""
    launch(
        _update_eight_bit,
        (len(eight_bit.programs), adapters.num_slots),
        adapters.weights,
        adapters.moment1,
        adapters.moment2,
        *eight_bit.absmax,
        *eight_bit.code,
        *eight_bit.midpoints,
        adapters.gradients,
        eight_bit.programs,
        eight_bit.ranks,
        table["rank"],
        norms,
        *(table[name] for name in _TABLE_FIELDS),
        adapters.weights.shape[1],
        eight_bit.bytes_per_slot,
        eight_bit.absmax.shape[2],
        ELEMENTS=CHUNK,
        SHARED=SHARED,
        SMALL=SMALL,
        num_warps=8,
    )


@triton.jit
def _is_within_rank(start, index, size, rank_layout, rank, BLOCK: tl.constexpr, MIXED_RANKS: tl.constexpr):
    """Return whether elements of one block are of the slot's own rank. Those beyond are zero, and stay zero."""
    inside = index < size
    if MIXED_RANKS:
        entry = rank_layout + start // BLOCK * 3
        first, distance = tl.load(entry, mask=start < size, other=0), tl.load(entry + 1, mask=start < size, other=1)
        last = tl.load(entry + 2, mask=start < size, other=0)  # the remainder by a power of two, without a division
        inside &= ((index - first) // distance & last) < rank
    return inside


@triton.jit(do_not_specialize=["slot_ranks", "applies", "blocks"])
def _sum_squares(
    gradients,  # (S, size) float32
    rank_layout,  # (size / BLOCK, 3) int32
    slot_ranks,  # (S,) int32
    applies,  # (S,) int32
    block_squares,  # out: (S, blocks) float32, where the slot steps
    size,
    blocks,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    MIXED_RANKS: tl.constexpr,
):
    wait_for_previous()
    block, slot = tl.program_id(0), tl.program_id(1)
    if tl.load(applies + slot) != 0:
        gradients += slot.to(tl.int64) * size
        rank = tl.load(slot_ranks + slot)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(block * ELEMENTS, (block + 1) * ELEMENTS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            own = _is_within_rank(start, at, size, rank_layout, rank, BLOCK, MIXED_RANKS)
            gradient = tl.load(gradients + at, mask=own, other=0.0)
            total += gradient * gradient
        tl.store(block_squares + slot * blocks + block, tl.sum(total))


@triton.jit
def _norm_of(block_squares, blocks, BLOCK: tl.constexpr):
    """Return the norm of a slot's gradient from the squares of its blocks."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(block_squares + index, mask=index < blocks, other=0.0)
    return tl.sqrt(tl.sum(total))


@triton.jit
def _load_hyperparameters(
    slot, learning_rates, weight_decays, one_minus_betas1, one_minus_betas2, epsilons, bias_corrections1,
    bias_corrections2,
):  # fmt: skip
    """Return what `_adamw` takes beside the tensors, for this slot."""
    learning_rate = tl.load(learning_rates + slot)
    decay = 1 - learning_rate * tl.load(weight_decays + slot)
    step_size = learning_rate / tl.load(bias_corrections1 + slot)
    one_minus_beta1, one_minus_beta2 = tl.load(one_minus_betas1 + slot), tl.load(one_minus_betas2 + slot)
    return (
        one_minus_beta1,
        one_minus_beta2,
        decay,
        step_size,
        tl.load(bias_corrections2 + slot),
        tl.load(epsilons + slot),
    )


@triton.jit
def _adamw(
    weight, moment1, moment2, gradient, one_minus_beta1, one_minus_beta2, decay, step_size, bias_correction2, epsilon
):  # fmt: skip
    """Return weight and moments after a step (arXiv 1711.05101)."""
    moment1 += (gradient - moment1) * one_minus_beta1
    moment2 += (gradient * gradient - moment2) * one_minus_beta2
    return weight * decay - step_size * moment1 / (tl.sqrt(moment2 / bias_correction2) + epsilon), moment1, moment2


_TABLE_ARGUMENTS = [
    "slot_ranks",
    "applies",
    "learning_rates",
    "weight_decays",
    "one_minus_betas1",
    "one_minus_betas2",
    "epsilons",
    "bias_corrections1",
    "bias_corrections2",
    "max_norms",
]


@triton.jit(do_not_specialize=["applies", "blocks"])
def _norms(block_squares, norms, applies, blocks, BLOCK: tl.constexpr):
    """Write the norm of each slot, (S,) float32; 0 where the batch goes on."""
    wait_for_previous()
    slot = tl.program_id(0)
    norm = 0.0
    if tl.load(applies + slot) != 0:
        norm = _norm_of(block_squares + slot * blocks, blocks, BLOCK)
    tl.store(norms + slot, norm)


@triton.jit(do_not_specialize=[*_TABLE_ARGUMENTS, "blocks"])
def _update(
    weights,  # (S, size)
    moments1,  # (S, size)
    moments2,  # (S, size)
    gradients,  # (S, size) float32
    rank_layout,  # (size / BLOCK, 3) int32
    slot_ranks,  # (S,) int32
    block_squares,  # (S, blocks) float32
    norms,  # out: (S,) float32
    applies,  # (S,) int32; the fields of the table from here to `max_norms` are (S,) float32
    learning_rates,
    weight_decays,
    one_minus_betas1,
    one_minus_betas2,
    epsilons,
    bias_corrections1,
    bias_corrections2,
    max_norms,
    size,
    blocks,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    MIXED_RANKS: tl.constexpr,
):
    wait_for_previous()
    block, slot = tl.program_id(0), tl.program_id(1)
    norm = 0.0
    if tl.load(applies + slot) != 0:
        norm = _norm_of(block_squares + slot * blocks, blocks, BLOCK)
        clip = tl.minimum(tl.load(max_norms + slot) / (norm + 1e-6), 1.0)
        one_minus_beta1, one_minus_beta2, decay, step_size, bias_correction2, epsilon = _load_hyperparameters(
            slot, learning_rates, weight_decays, one_minus_betas1, one_minus_betas2, epsilons, bias_corrections1,
            bias_corrections2,
        )  # fmt: skip
        offset, rank = slot.to(tl.int64) * size, tl.load(slot_ranks + slot)
        for start in range(block * ELEMENTS, (block + 1) * ELEMENTS, BLOCK):
            index = start + tl.arange(0, BLOCK)
            own, at = _is_within_rank(start, index, size, rank_layout, rank, BLOCK, MIXED_RANKS), offset + index
            if norm < float("inf"):
                gradient = tl.load(gradients + at, mask=own) * clip
                moment1 = tl.load(moments1 + at, mask=own).to(tl.float32)
                moment2 = tl.load(moments2 + at, mask=own).to(tl.float32)
                weight = tl.load(weights + at, mask=own).to(tl.float32)
                weight, moment1, moment2 = _adamw(
                    weight, moment1, moment2, gradient, one_minus_beta1, one_minus_beta2, decay, step_size,
                    bias_correction2, epsilon,
                )  # fmt: skip
                tl.store(moments1 + at, moment1.to(moments1.dtype.element_ty), mask=own)
                tl.store(moments2 + at, moment2.to(moments2.dtype.element_ty), mask=own)
                tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=own)
            tl.store(gradients + at, tl.zeros((BLOCK,), tl.float32), mask=own)
    if block == 0:
        tl.store(norms + slot, norm)


@triton.jit
def _nearest(midpoints, values):
    """Return the index of the nearest of 256 ascending values, by binary search in the 255 midpoints between them."""
    index = tl.zeros(values.shape, tl.int32)
    for power in tl.static_range(8):
        index += tl.where(tl.load(midpoints + index + (128 >> power) - 1) < values, 128 >> power, 0)
    return index


@triton.jit(do_not_specialize=[*_TABLE_ARGUMENTS, "absmax1", "absmax2", "size", "num_bytes", "num_absmax"])
def _update_eight_bit(
    weights,  # (S, size)
    moments1,  # (S, num_bytes) uint8
    moments2,  # (S, num_bytes) uint8
    absmax1,  # (S, num_absmax) float32
    absmax2,  # (S, num_absmax) float32
    code1,  # (256,) float32
    code2,  # (256,) float32
    midpoints1,  # (255,) float32
    midpoints2,  # (255,) float32
    gradients,  # (S, size) float32
    programs,  # (programs, 11) int32, see `EightBitMoments.programs`
    layer_ranks,  # (layers, S) int32
    slot_ranks,  # (S,) int32
    norms,  # (S,) float32
    applies,  # (S,) int32; the fields of the table from here to `max_norms` are (S,) float32
    learning_rates,
    weight_decays,
    one_minus_betas1,
    one_minus_betas2,
    epsilons,
    bias_corrections1,
    bias_corrections2,
    max_norms,
    size,
    num_bytes,
    num_absmax,
    ELEMENTS: tl.constexpr,
    SHARED: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Step ELEMENTS elements of one matrix: dequantize both moments, step, quantize them, clear the gradient.

    A matrix below SMALL elements has its moments in float32, in the same bytes. Both forms take the same instructions:
    masks choose which loads and stores take place.
    """
    wait_for_previous()
    program, slot = tl.program_id(0), tl.program_id(1)
    if tl.load(applies + slot) != 0:
        norm = tl.load(norms + slot)
        entry = programs + program * 11
        offset, features, inner = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
        outer_stride, rank_stride, inner_stride = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
        first_byte, first_absmax, first = tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 10)
        rank = tl.load(layer_ranks + tl.load(entry + 9) * tl.num_programs(1) + slot)
        rank = tl.minimum(tl.minimum(rank, tl.load(slot_ranks + slot)), tl.load(entry + 2))
        length = features * rank
        if first < length:
            block_start = first + tl.arange(0, ELEMENTS // SHARED) * SHARED
            element = block_start[:, None] + tl.arange(0, SHARED)[None, :]
            own = element < length
            of_rank = element // inner  # (outer, rank) of the element
            at = of_rank // rank * outer_stride + of_rank % rank * rank_stride + element % inner * inner_stride
            at += slot.to(tl.int64) * size + offset
            if norm < float("inf"):
                one_minus_beta1, one_minus_beta2, decay, step_size, bias_correction2, epsilon = _load_hyperparameters(
                    slot, learning_rates, weight_decays, one_minus_betas1, one_minus_betas2, epsilons,
                    bias_corrections1, bias_corrections2,
                )  # fmt: skip
                clip = tl.minimum(tl.load(max_norms + slot) / (norm + 1e-6), 1.0)
                gradient = tl.load(gradients + at, mask=own, other=0.0) * clip
                bytes1 = moments1 + slot.to(tl.int64) * num_bytes + first_byte
                bytes2 = moments2 + slot.to(tl.int64) * num_bytes + first_byte
                floats1 = bytes1.to(tl.pointer_type(tl.float32)) + element
                floats2 = bytes2.to(tl.pointer_type(tl.float32)) + element
                absmax1_at = absmax1 + slot * num_absmax + first_absmax + block_start // SHARED
                absmax2_at = absmax2 + slot * num_absmax + first_absmax + block_start // SHARED
                num_quantized = tl.where(length < SMALL, 0, length)
                in_floats, in_bytes = element < length - num_quantized, element < num_quantized
                has_absmax = block_start < num_quantized
                moment1 = tl.load(floats1, mask=in_floats, other=0.0)
                moment2 = tl.load(floats2, mask=in_floats, other=0.0)
                index1 = tl.load(bytes1 + element, mask=in_bytes, other=0).to(tl.int32)
                index2 = tl.load(bytes2 + element, mask=in_bytes, other=0).to(tl.int32)
                moment1 += tl.load(code1 + index1) * tl.load(absmax1_at, mask=has_absmax, other=0.0)[:, None]
                moment2 += tl.load(code2 + index2) * tl.load(absmax2_at, mask=has_absmax, other=0.0)[:, None]
                weight = tl.load(weights + at, mask=own, other=0.0).to(tl.float32)
                weight, moment1, moment2 = _adamw(
                    weight, moment1, moment2, gradient, one_minus_beta1, one_minus_beta2, decay, step_size,
                    bias_correction2, epsilon,
                )  # fmt: skip
                tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=own)
                tl.store(floats1, moment1, mask=in_floats)
                tl.store(floats2, moment2, mask=in_floats)
                moment1, moment2 = tl.where(in_bytes, moment1, 0.0), tl.where(in_bytes, moment2, 0.0)
                largest1, largest2 = tl.max(tl.abs(moment1), 1), tl.max(moment2, 1)
                tl.store(absmax1_at, largest1, mask=has_absmax)
                tl.store(absmax2_at, largest2, mask=has_absmax)
                # 1 and not a tiny constant: one that float32 cannot hold makes Triton 3.6 compute in float64 from here.
                index1 = _nearest(midpoints1, moment1 / tl.where(largest1 > 0, largest1, 1.0)[:, None])
                index2 = _nearest(midpoints2, moment2 / tl.where(largest2 > 0, largest2, 1.0)[:, None])
                tl.store(bytes1 + element, index1.to(tl.uint8), mask=in_bytes)
                tl.store(bytes2 + element, index2.to(tl.uint8), mask=in_bytes)
            tl.store(gradients + at, tl.zeros((ELEMENTS // SHARED, SHARED), tl.float32), mask=own)
