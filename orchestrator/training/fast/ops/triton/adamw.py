"""AdamW for all slots in two Triton kernels: squares of gradients by blocks; then norm, clipping and step at once.

With moments in eight bits in three, for there the second has many more programs, too many to sum the norm in each.
"""

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.eight_bit import CHUNK
from orchestrator.training.fast.ops.triton.launch import after_previous, launch
from orchestrator.training.fast.sizes import SHARED, SMALL
from orchestrator.training.fast.step.adapters import BLOCK, Adapters
from orchestrator.training.fast.step.flat_batch import FlatBatch

_ELEMENTS = 8192
# Weights that one program updates.


def update(adapters: Adapters, row: FlatBatch) -> torch.Tensor:
    """Clip, make the AdamW step (arXiv 1711.05101) and clear the gradient of each slot whose batch is complete.

    A slot whose gradient is not finite does not step; its norm tells.

    Returns:
        (slots,) float32 norms of the gradients before clipping; 0 where the batch goes on.
    """
    size, table = adapters.weights.shape[1], row.table
    blocks = triton.cdiv(size, _ELEMENTS)
    squares = torch.empty(adapters.num_slots, blocks, dtype=torch.float32, device=adapters.weights.device)
    norms = torch.empty(adapters.num_slots, dtype=torch.float32, device=adapters.weights.device)
    grid = (blocks, adapters.num_slots)
    eight = adapters.eight  # there nothing beyond a slot's own rank is cleared, and so nothing of it may count
    ranks = {"RANK": adapters.rank, "MIXED": adapters.num_slots > 1 or eight is not None}
    launch(
        _squares,
        grid,
        adapters.gradients,
        adapters.strides,
        table["rank"],
        table["applies"],
        squares,
        size,
        blocks,
        ELEMENTS=_ELEMENTS,
        BLOCK=BLOCK,
        **ranks,
    )
    values = [
        table[name]
        for name in (
            "applies",
            "learning_rate",
            "decay",
            "gain1",
            "gain2",
            "epsilon",
            "correction1",
            "correction2",
            "max_norm",
        )
    ]
    if eight is not None:
        launch(_norms, (adapters.num_slots,), squares, norms, table["applies"], blocks, BLOCK=BLOCK)
        launch(
            _update_eight_bit,
            (len(eight.programs), adapters.num_slots),
            adapters.weights,
            adapters.moment1,
            adapters.moment2,
            *eight.magnitudes,
            *eight.maps,
            *eight.bounds,
            adapters.gradients,
            eight.programs,
            table["rank"],
            norms,
            *values,
            size,
            eight.size,
            eight.magnitudes.shape[2],
            ELEMENTS=CHUNK,
            SHARED=SHARED,
            SMALL=SMALL,
            RANK=adapters.rank,
            num_warps=8,
        )
        return norms
    launch(
        _update,
        grid,
        adapters.weights,
        adapters.moment1,
        adapters.moment2,
        adapters.gradients,
        adapters.strides,
        table["rank"],
        squares,
        norms,
        *values,
        size,
        blocks,
        ELEMENTS=_ELEMENTS,
        BLOCK=BLOCK,
        num_warps=8,
        **ranks,
    )
    return norms


@triton.jit
def _is_own(start, index, size, strides, rank, RANK: tl.constexpr, BLOCK: tl.constexpr, MIXED: tl.constexpr):
    """Whether elements of one block are of the slot's own rank: what the stack has beyond is zero, and stays."""
    inside = index < size
    if MIXED:
        entry = strides + start // BLOCK * 2
        first, apart = tl.load(entry, mask=start < size, other=0), tl.load(entry + 1, mask=start < size, other=1)
        inside &= (index - first) // apart % RANK < rank
    return inside


@triton.jit(do_not_specialize=["slot_ranks", "applies", "blocks"])
def _squares(
    gradients,
    strides,
    slot_ranks,
    applies,
    squares,
    size,
    blocks,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    MIXED: tl.constexpr,
):
    after_previous()
    block, slot = tl.program_id(0), tl.program_id(1)
    if tl.load(applies + slot) != 0:
        gradients += slot.to(tl.int64) * size
        rank = tl.load(slot_ranks + slot)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(block * ELEMENTS, (block + 1) * ELEMENTS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            own = _is_own(start, at, size, strides, rank, RANK, BLOCK, MIXED)
            gradient = tl.load(gradients + at, mask=own, other=0.0)
            total += gradient * gradient
        tl.store(squares + slot * blocks + block, tl.sum(total))


@triton.jit
def _norm_of(squares, blocks, BLOCK: tl.constexpr):
    """Norm of a slot's gradient, by the sums of its blocks."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(squares + index, mask=index < blocks, other=0.0)
    return tl.sqrt(tl.sum(total))


@triton.jit
def _values(slot, learning_rates, decays, gains1, gains2, epsilons, corrections1, corrections2):
    """What `_adamw` takes, of this slot."""
    learning_rate = tl.load(learning_rates + slot)
    fade = 1 - learning_rate * tl.load(decays + slot)
    rate = learning_rate / tl.load(corrections1 + slot)
    gain1, gain2 = tl.load(gains1 + slot), tl.load(gains2 + slot)
    return gain1, gain2, fade, rate, tl.load(corrections2 + slot), tl.load(epsilons + slot)


@triton.jit
def _adamw(weight, moment1, moment2, gradient, gain1, gain2, fade, rate, correction2, epsilon):
    """The three after a step."""
    moment1 += (gradient - moment1) * gain1
    moment2 += (gradient * gradient - moment2) * gain2
    return weight * fade - rate * moment1 / (tl.sqrt(moment2 / correction2) + epsilon), moment1, moment2


_OF_THE_TABLE = [
    "slot_ranks",
    "applies",
    "learning_rates",
    "decays",
    "gains1",
    "gains2",
    "epsilons",
    "corrections1",
    "corrections2",
    "max_norms",
]


@triton.jit(do_not_specialize=["applies", "blocks"])
def _norms(squares, norms, applies, blocks, BLOCK: tl.constexpr):
    after_previous()
    slot = tl.program_id(0)
    norm = 0.0
    if tl.load(applies + slot) != 0:
        norm = _norm_of(squares + slot * blocks, blocks, BLOCK)
    tl.store(norms + slot, norm)


@triton.jit(do_not_specialize=[*_OF_THE_TABLE, "blocks"])
def _update(
    weights,
    moments1,
    moments2,
    gradients,
    strides,
    slot_ranks,
    squares,
    norms,
    applies,
    learning_rates,
    decays,
    gains1,
    gains2,
    epsilons,
    corrections1,
    corrections2,
    max_norms,
    size,
    blocks,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    MIXED: tl.constexpr,
):
    after_previous()
    block, slot = tl.program_id(0), tl.program_id(1)
    norm = 0.0
    if tl.load(applies + slot) != 0:
        norm = _norm_of(squares + slot * blocks, blocks, BLOCK)
        clip = tl.minimum(tl.load(max_norms + slot) / (norm + 1e-6), 1.0)
        gain1, gain2, fade, rate, correction2, epsilon = _values(
            slot, learning_rates, decays, gains1, gains2, epsilons, corrections1, corrections2
        )
        offset, rank = slot.to(tl.int64) * size, tl.load(slot_ranks + slot)
        for start in range(block * ELEMENTS, (block + 1) * ELEMENTS, BLOCK):
            index = start + tl.arange(0, BLOCK)
            own, at = _is_own(start, index, size, strides, rank, RANK, BLOCK, MIXED), offset + index
            if norm < float("inf"):
                gradient = tl.load(gradients + at, mask=own) * clip
                moment1 = tl.load(moments1 + at, mask=own).to(tl.float32)
                moment2 = tl.load(moments2 + at, mask=own).to(tl.float32)
                weight = tl.load(weights + at, mask=own).to(tl.float32)
                weight, moment1, moment2 = _adamw(
                    weight, moment1, moment2, gradient, gain1, gain2, fade, rate, correction2, epsilon
                )
                tl.store(moments1 + at, moment1.to(moments1.dtype.element_ty), mask=own)
                tl.store(moments2 + at, moment2.to(moments2.dtype.element_ty), mask=own)
                tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=own)
            tl.store(gradients + at, tl.zeros((BLOCK,), tl.float32), mask=own)
    if block == 0:
        tl.store(norms + slot, norm)


@triton.jit
def _nearest(bounds, values):
    """Of 256 ascending values the place of the nearest, by the 255 `bounds` half way between them."""
    place = tl.zeros(values.shape, tl.int32)
    for power in tl.static_range(8):
        place += tl.where(tl.load(bounds + place + (128 >> power) - 1) < values, 128 >> power, 0)
    return place


@triton.jit(do_not_specialize=[*_OF_THE_TABLE, "magnitudes1", "magnitudes2", "size", "num_bytes", "num_magnitudes"])
def _update_eight_bit(
    weights,
    moments1,
    moments2,
    magnitudes1,
    magnitudes2,
    map1,
    map2,
    bounds1,
    bounds2,
    gradients,
    programs,
    slot_ranks,
    norms,
    applies,
    learning_rates,
    decays,
    gains1,
    gains2,
    epsilons,
    corrections1,
    corrections2,
    max_norms,
    size,
    num_bytes,
    num_magnitudes,
    ELEMENTS: tl.constexpr,
    SHARED: tl.constexpr,
    SMALL: tl.constexpr,
    RANK: tl.constexpr,
):
    after_previous()
    program, slot = tl.program_id(0), tl.program_id(1)
    if tl.load(applies + slot) != 0:
        norm = tl.load(norms + slot)
        entry = programs + program * 6
        at, features, is_b = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        byte, magnitude, first = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
        rank = tl.load(slot_ranks + slot)
        length = features * rank
        if first < length:
            shared = first + tl.arange(0, ELEMENTS // SHARED) * SHARED
            element = shared[:, None] + tl.arange(0, SHARED)[None, :]
            own = element < length
            place = tl.where(is_b != 0, element // rank * RANK + element % rank, element)
            place += slot.to(tl.int64) * size + at
            if norm < float("inf"):
                gain1, gain2, fade, rate, correction2, epsilon = _values(
                    slot, learning_rates, decays, gains1, gains2, epsilons, corrections1, corrections2
                )
                clip = tl.minimum(tl.load(max_norms + slot) / (norm + 1e-6), 1.0)
                gradient = tl.load(gradients + place, mask=own, other=0.0) * clip
                bytes1 = moments1 + slot.to(tl.int64) * num_bytes + byte
                bytes2 = moments2 + slot.to(tl.int64) * num_bytes + byte
                floats1 = bytes1.to(tl.pointer_type(tl.float32)) + element
                floats2 = bytes2.to(tl.pointer_type(tl.float32)) + element
                shared1 = magnitudes1 + slot * num_magnitudes + magnitude + shared // SHARED
                shared2 = magnitudes2 + slot * num_magnitudes + magnitude + shared // SHARED
                in_bytes = tl.where(length < SMALL, 0, length)
                wide, narrow, in_use = element < length - in_bytes, element < in_bytes, shared < in_bytes
                moment1 = tl.load(floats1, mask=wide, other=0.0)
                moment2 = tl.load(floats2, mask=wide, other=0.0)
                code1 = tl.load(bytes1 + element, mask=narrow, other=0).to(tl.int32)
                code2 = tl.load(bytes2 + element, mask=narrow, other=0).to(tl.int32)
                moment1 += tl.load(map1 + code1) * tl.load(shared1, mask=in_use, other=0.0)[:, None]
                moment2 += tl.load(map2 + code2) * tl.load(shared2, mask=in_use, other=0.0)[:, None]
                weight = tl.load(weights + place, mask=own, other=0.0).to(tl.float32)
                weight, moment1, moment2 = _adamw(
                    weight, moment1, moment2, gradient, gain1, gain2, fade, rate, correction2, epsilon
                )
                tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=own)
                tl.store(floats1, moment1, mask=wide)
                tl.store(floats2, moment2, mask=wide)
                moment1, moment2 = tl.where(narrow, moment1, 0.0), tl.where(narrow, moment2, 0.0)
                largest1, largest2 = tl.max(tl.abs(moment1), 1), tl.max(moment2, 1)
                tl.store(shared1, largest1, mask=in_use)
                tl.store(shared2, largest2, mask=in_use)
                # No tiny constant instead of 1: of one that float32 has not, Triton 3.6 makes all of it float64.
                code1 = _nearest(bounds1, moment1 / tl.where(largest1 > 0, largest1, 1.0)[:, None])
                code2 = _nearest(bounds2, moment2 / tl.where(largest2 > 0, largest2, 1.0)[:, None])
                tl.store(bytes1 + element, code1.to(tl.uint8), mask=narrow)
                tl.store(bytes2 + element, code2.to(tl.uint8), mask=narrow)
            tl.store(gradients + place, tl.zeros((ELEMENTS // SHARED, SHARED), tl.float32), mask=own)
