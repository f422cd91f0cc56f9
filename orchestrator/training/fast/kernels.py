"""The parts of a fast step in Triton: what `plain` says, for CUDA and bfloat16 (arXiv 2410.10989 fuses in like places).

Nothing here waits for the device or depends on its data, all sums have one order, and launch shapes are fixed: a step
can be captured as it stands. The first call of a kernel compiles it, or finds it in Triton's cache: before a capture.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from orchestrator.training.fast.attention_kernels import Attended, attention, attention_backward
from orchestrator.training.fast.early import LAUNCH, after_previous
from orchestrator.training.fast.lora import Adapters
from orchestrator.training.fast.lora_kernels import lora_backward, lora_down, lora_up_
from orchestrator.training.fast.plain import Heads
from orchestrator.training.fast.row import Row

__all__ = [
    "TILE",
    "Attended",
    "Heads",
    "add_norm",
    "add_norm_backward",
    "attention",
    "attention_backward",
    "cross_entropy",
    "lora_backward",
    "lora_down",
    "lora_up_",
    "sum_by_slot",
    "swiglu",
    "swiglu_backward",
    "update",
]

TILE = 64
"""Tokens that surely belong to one slot."""

MAX_LOGITS = 1 << 26
"""Elements of the logits that exist at a time."""

IGNORED: tl.constexpr = tl.constexpr(-100)
"""`row.IGNORED`, where a kernel reads it."""


def add_norm(
    states: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual sum, its RMS norm (arXiv 1910.07467), and the reciprocal root: (T, H), (T, H), (T,) float32."""
    num_tokens, features = states.shape
    total = states if delta is None else torch.empty_like(states)
    normed = torch.empty_like(states)
    root = torch.empty(num_tokens, dtype=torch.float32, device=states.device)
    _add_norm[num_tokens,](
        states,
        states if delta is None else delta,
        weight,
        total,
        normed,
        root,
        epsilon,
        features,
        ADDS=delta is not None,
        BLOCK=triton.next_power_of_2(features),
        num_warps=4 if features <= 2048 else 16,
        **LAUNCH,
    )
    return total, normed, root


def add_norm_backward(
    gradient: torch.Tensor,
    normed_gradient: torch.Tensor,
    states: torch.Tensor,
    root: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the residual sum (so of both its terms): what came by the residual, plus through the norm. (T, H)."""
    num_tokens, features = states.shape
    result = torch.empty_like(gradient)
    _add_norm_backward[num_tokens,](
        gradient,
        normed_gradient,
        states,
        root,
        weight,
        result,
        features,
        BLOCK=triton.next_power_of_2(features),
        num_warps=8 if features <= 2048 else 16,
        **LAUNCH,
    )
    return result


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: (T, 2 I) -> (T, I)."""
    num_tokens, features = len(gate_up), gate_up.shape[1] // 2
    product = gate_up.new_empty(num_tokens, features)
    _swiglu[num_tokens, triton.cdiv(features, 1024)](gate_up, product, features, BLOCK=1024, **LAUNCH)
    return product


def swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """(T, I) -> (T, 2 I)."""
    num_tokens, features = gradient.shape
    result = torch.empty_like(gate_up)
    _swiglu_backward[num_tokens, triton.cdiv(features, 1024)](gradient, gate_up, result, features, BLOCK=1024, **LAUNCH)
    return result


def cross_entropy(
    states: torch.Tensor, head: torch.Tensor, row: Row, trains: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss and gradient of the LM head in one pass; logits of `MAX_LOGITS` at a time become their own gradient.

    Args:
        states: (T, H) after the last norm.
        head: (vocabulary, H).
        trains: whether the gradient is wanted.

    Returns:
        (T,) float32 losses and (T,) float32 whether the target was likeliest, both 0 where there is no target; and the
        gradient of the weighted losses' sum for the states, (T, H).
    """
    num_tokens, vocabulary = len(states), len(head)
    losses = torch.empty(num_tokens, dtype=torch.float32, device=states.device)
    hits = torch.empty_like(losses)
    result = torch.empty_like(states) if trains else None
    chunk = min(num_tokens, max(1, MAX_LOGITS // vocabulary))
    for start in range(0, num_tokens, chunk):
        part = slice(start, min(start + chunk, num_tokens))
        logits = F.linear(states[part], head)
        _cross_entropy[len(logits),](
            logits,
            row.targets,
            row.tiles,
            row.table["loss_weight"],
            losses,
            hits,
            start,
            vocabulary,
            TRAINS=trains,
            TILE=_tile(row),
            BLOCK=4096,
            num_warps=8,
            **LAUNCH,
        )
        if result is not None:
            torch.mm(logits, head, out=result[part])
    return losses, hits, result


def sum_by_slot(values: torch.Tensor, row: Row, num_slots: int) -> torch.Tensor:
    """(T,) float32 -> (slots,). The same order of sums each time."""
    sums = torch.empty(num_slots, dtype=torch.float32, device=values.device)
    _sum_by_slot[num_slots,](values, row.tiles, sums, len(values), TILE=_tile(row), BLOCK=1024, **LAUNCH)
    return sums


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
    _squares[grid](
        adapters.gradients, table["applies"], squares, size, blocks, ELEMENTS=_ELEMENTS, BLOCK=2048, **LAUNCH
    )
    _update[grid](
        adapters.weights,
        adapters.moment1,
        adapters.moment2,
        adapters.gradients,
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
        BLOCK=1024,
        **LAUNCH,
    )
    return norms


_ELEMENTS = 16384
# Weights that one program updates.


def _tile(row: Row) -> int:
    return row.num_tokens // len(row.tiles)


@triton.jit
def _add_norm(
    states, delta, weight, total, normed, root, epsilon, features, ADDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    after_previous()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside, at = columns < features, token * features + columns
    state = tl.load(states + at, mask=inside, other=0.0)
    if ADDS:
        state += tl.load(delta + at, mask=inside, other=0.0)
        tl.store(total + at, state, mask=inside)
    wide = state.to(tl.float32)
    reciprocal = tl.rsqrt(tl.sum(wide * wide) / features + epsilon)
    tl.store(root + token, reciprocal)
    unit = (wide * reciprocal).to(state.dtype)
    tl.store(normed + at, tl.load(weight + columns, mask=inside) * unit, mask=inside)


@triton.jit
def _add_norm_backward(gradient, normed_gradient, states, root, weight, result, features, BLOCK: tl.constexpr):
    after_previous()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside, at = columns < features, token * features + columns
    reciprocal = tl.load(root + token)
    unit = tl.load(states + at, mask=inside, other=0.0).to(tl.float32) * reciprocal
    scaled = tl.load(normed_gradient + at, mask=inside, other=0.0) * tl.load(weight + columns, mask=inside, other=0.0)
    scaled = scaled.to(tl.float32)
    through = (scaled - unit * (tl.sum(scaled * unit) / features)) * reciprocal
    residual = tl.load(gradient + at, mask=inside)
    tl.store(result + at, residual + through.to(residual.dtype), mask=inside)


@triton.jit
def _swiglu(gate_up, product, features, BLOCK: tl.constexpr):
    after_previous()
    token, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = columns < features, token * 2 * features + columns
    gate = tl.load(gate_up + at, mask=inside, other=0.0)
    up = tl.load(gate_up + features + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(product + token * features + columns, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, mask=inside)


@triton.jit
def _swiglu_backward(gradient, gate_up, result, features, BLOCK: tl.constexpr):
    after_previous()
    token, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = columns < features, token * 2 * features + columns
    by_product = tl.load(gradient + token * features + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + features + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    by_gate = by_product * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(result + at, by_gate.to(result.dtype.element_ty), mask=inside)
    tl.store(result + features + at, (by_product * gate * sigmoid).to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["weights", "start"])
def _cross_entropy(
    logits,
    targets,
    tiles,
    weights,
    losses,
    hits,
    start,
    vocabulary,
    TRAINS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    after_previous()
    token = start + tl.program_id(0)
    logits += tl.program_id(0).to(tl.int64) * vocabulary
    target = tl.load(targets + token)
    each = tl.arange(0, BLOCK)
    if target == IGNORED:
        tl.store(losses + token, 0.0)
        tl.store(hits + token, 0.0)
        if TRAINS:
            for first in range(0, vocabulary, BLOCK):
                tl.store(logits + first + each, tl.zeros((BLOCK,), logits.dtype.element_ty), first + each < vocabulary)
    else:
        wanted = tl.load(logits + target).to(tl.float32)
        highest = wanted
        sums = tl.zeros((BLOCK,), tl.float32)
        beaten = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, vocabulary, BLOCK):
            columns = first + each
            logit = tl.load(logits + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
            beaten |= ((logit > wanted) | ((logit == wanted) & (columns < target))).to(tl.int32)
            before, highest = highest, tl.maximum(highest, tl.max(logit))
            sums = sums * tl.exp(before - highest) + tl.exp(logit - highest)
        norm = tl.sum(sums)
        tl.store(losses + token, tl.log(norm) + highest - wanted)
        tl.store(hits + token, ((tl.max(beaten) == 0) & (wanted == wanted)).to(tl.float32))
        if TRAINS:
            weight = tl.load(weights + tl.load(tiles + token // TILE))
            for first in range(0, vocabulary, BLOCK):
                columns = first + each
                logit = tl.load(logits + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
                share = tl.exp(logit - highest) / norm - (columns == target).to(tl.float32)
                tl.store(logits + columns, (share * weight).to(logits.dtype.element_ty), mask=columns < vocabulary)


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_by_slot(values, tiles, sums, num_tokens, TILE: tl.constexpr, BLOCK: tl.constexpr):
    after_previous()
    slot = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tokens, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < num_tokens
        owner = tl.load(tiles + tokens // TILE, mask=inside, other=-1)
        total += tl.load(values + tokens, mask=inside & (owner == slot), other=0.0)
    tl.store(sums + slot, tl.sum(total))


@triton.jit(do_not_specialize=["applies"])
def _squares(gradients, applies, squares, size, blocks, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr):
    after_previous()
    block, slot = tl.program_id(0), tl.program_id(1)
    if tl.load(applies + slot) != 0:
        gradients += slot.to(tl.int64) * size
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, ELEMENTS, BLOCK):
            at = block * ELEMENTS + start + tl.arange(0, BLOCK)
            gradient = tl.load(gradients + at, mask=at < size, other=0.0)
            total += gradient * gradient
        tl.store(squares + slot * blocks + block, tl.sum(total))


@triton.jit(
    do_not_specialize=[
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
        offset = slot.to(tl.int64) * size
        for start in range(0, ELEMENTS, BLOCK):
            index = block * ELEMENTS + start + tl.arange(0, BLOCK)
            inside, at = index < size, offset + index
            if norm < float("inf"):
                gradient = tl.load(gradients + at, mask=inside) * clip
                moment1 = tl.load(moments1 + at, mask=inside).to(tl.float32)
                moment2 = tl.load(moments2 + at, mask=inside).to(tl.float32)
                weight = tl.load(weights + at, mask=inside).to(tl.float32)
                moment1 += (gradient - moment1) * gain1
                moment2 += (gradient * gradient - moment2) * gain2
                weight = weight * fade - rate * moment1 / (tl.sqrt(moment2 / correction2) + epsilon)
                tl.store(moments1 + at, moment1.to(moments1.dtype.element_ty), mask=inside)
                tl.store(moments2 + at, moment2.to(moments2.dtype.element_ty), mask=inside)
                tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=inside)
            tl.store(gradients + at, tl.zeros((BLOCK,), tl.float32), mask=inside)
    if block == 0:
        tl.store(norms + slot, norm)
