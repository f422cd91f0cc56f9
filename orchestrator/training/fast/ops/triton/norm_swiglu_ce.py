"""The parts of a fast step in Triton: what `plain` says, for CUDA and bfloat16 (arXiv 2410.10989 fuses in like places).

Nothing here waits for the device or depends on its data, all sums have one order, and launch shapes are fixed: a step
can be captured as it stands. The first call of a kernel compiles it, or finds it in Triton's cache: before a capture.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from orchestrator.training.fast.ops.reference import Heads
from orchestrator.training.fast.ops.triton.adamw import update
from orchestrator.training.fast.ops.triton.attention import Attended, attention, attention_backward
from orchestrator.training.fast.ops.triton.launch import after_previous, compiled_together, launch
from orchestrator.training.fast.ops.triton.lora_backward import lora_backward
from orchestrator.training.fast.ops.triton.lora_forward import lora_down, lora_up_
from orchestrator.training.fast.sizes import MAX_LOGITS
from orchestrator.training.fast.step.flat_batch import IGNORED, FlatBatch

__all__ = [
    "TILE",
    "Attended",
    "Heads",
    "add_norm",
    "add_norm_backward",
    "attention",
    "attention_backward",
    "compiled_together",
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

_IGNORED = tl.constexpr(IGNORED)


def add_norm(
    states: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual sum, its RMS norm (arXiv 1910.07467), and the reciprocal root: (T, H), (T, H), (T,) float32."""
    num_tokens, features = states.shape
    total = states if delta is None else torch.empty_like(states)
    normed = torch.empty_like(states)
    root = torch.empty(num_tokens, dtype=torch.float32, device=states.device)
    launch(
        _add_norm,
        (num_tokens,),
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
    launch(
        _add_norm_backward,
        (num_tokens,),
        gradient,
        normed_gradient,
        states,
        root,
        weight,
        result,
        features,
        BLOCK=triton.next_power_of_2(features),
        num_warps=8 if features <= 2048 else 16,
    )
    return result


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: (T, 2 I) -> (T, I)."""
    num_tokens, features = len(gate_up), gate_up.shape[1] // 2
    product = gate_up.new_empty(num_tokens, features)
    launch(_swiglu, (num_tokens, triton.cdiv(features, 1024)), gate_up, product, features, BLOCK=1024)
    return product


def swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """(T, I) -> (T, 2 I)."""
    num_tokens, features = gradient.shape
    result = torch.empty_like(gate_up)
    launch(_swiglu_backward, (num_tokens, triton.cdiv(features, 1024)), gradient, gate_up, result, features, BLOCK=1024)
    return result


def cross_entropy(
    states: torch.Tensor, head: torch.Tensor, row: FlatBatch, trains: bool
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
        launch(
            _cross_entropy,
            (len(logits),),
            logits,
            row.targets,
            row.tiles,
            row.table["loss_weight"],
            losses,
            hits,
            start,
            vocabulary,
            TRAINS=trains,
            TILE=row.tile,
            BLOCK=4096,
            num_warps=8,
        )
        if result is not None:
            torch.mm(logits, head, out=result[part])
    return losses, hits, result


def sum_by_slot(values: torch.Tensor, row: FlatBatch, num_slots: int) -> torch.Tensor:
    """(T,) float32 -> (slots,). The same order of sums each time."""
    sums = torch.empty(num_slots, dtype=torch.float32, device=values.device)
    launch(_sum_by_slot, (num_slots,), values, row.tiles, sums, len(values), TILE=row.tile, BLOCK=1024)
    return sums


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
    if target == _IGNORED:
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
