"""AdamW for all slots in two Triton kernels: squares of gradients by blocks; then norm, clipping and step at once."""

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.launch import after_previous, launch
from orchestrator.training.fast.lora import BLOCK, Adapters
from orchestrator.training.fast.row import Row

_ELEMENTS = 8192
# Weights that one program updates.


def update(adapters: Adapters, row: Row) -> torch.Tensor:
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
    ranks = {"RANK": adapters.rank, "MIXED": adapters.num_slots > 1}
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
        table["applies"],
        table["learning_rate"],
        table["decay"],
        table["gain1"],
        table["gain2"],
        table["epsilon"],
        table["correction1"],
        table["correction2"],
        table["max_norm"],
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


@triton.jit(do_not_specialize=["slot_ranks", "applies"])
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


@triton.jit(
    do_not_specialize=[
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
)
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
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, blocks, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(squares + slot * blocks + index, mask=index < blocks, other=0.0)
        norm = tl.sqrt(tl.sum(total))
        learning_rate, gain1, gain2 = tl.load(learning_rates + slot), tl.load(gains1 + slot), tl.load(gains2 + slot)
        clip = tl.minimum(tl.load(max_norms + slot) / (norm + 1e-6), 1.0)
        fade = 1 - learning_rate * tl.load(decays + slot)
        rate = learning_rate / tl.load(corrections1 + slot)
        correction2, epsilon = tl.load(corrections2 + slot), tl.load(epsilons + slot)
        offset, rank = slot.to(tl.int64) * size, tl.load(slot_ranks + slot)
        for start in range(block * ELEMENTS, (block + 1) * ELEMENTS, BLOCK):
            index = start + tl.arange(0, BLOCK)
            own, at = _is_own(start, index, size, strides, rank, RANK, BLOCK, MIXED), offset + index
            if norm < float("inf"):
                gradient = tl.load(gradients + at, mask=own) * clip
                moment1 = tl.load(moments1 + at, mask=own).to(tl.float32)
                moment2 = tl.load(moments2 + at, mask=own).to(tl.float32)
                weight = tl.load(weights + at, mask=own).to(tl.float32)
                moment1 += (gradient - moment1) * gain1
                moment2 += (gradient * gradient - moment2) * gain2
                weight = weight * fade - rate * moment1 / (tl.sqrt(moment2 / correction2) + epsilon)
                tl.store(moments1 + at, moment1.to(moments1.dtype.element_ty), mask=own)
                tl.store(moments2 + at, moment2.to(moments2.dtype.element_ty), mask=own)
                tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=own)
            tl.store(gradients + at, tl.zeros((BLOCK,), tl.float32), mask=own)
    if block == 0:
        tl.store(norms + slot, norm)
