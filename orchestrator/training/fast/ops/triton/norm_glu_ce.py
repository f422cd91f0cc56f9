"""Norms, GLU, cross entropy and sums by slot in Triton. Liger Kernel (arXiv 2410.10989) fuses the same places.

    _add_norm, _add_norm_backward   grid (T,)             one program for each token: its H features in one block
    _glu, _glu_backward             grid (T, I / 1024)    one program for 1,024 features of a token
    _cross_entropy                  grid (tokens,)        one program for a token with a loss: V logits in blocks
    _sum_by_slot                    grid (S,)             one program for each slot: T values in blocks of 1,024

By the measurements in docs/log.md (2026-11-26, H200), norms and GLU move their bytes as fast as memory allows, and
other numbers of warps change nothing.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from orchestrator.training.fast.families.family import Activation
from orchestrator.training.fast.ops.protocol import LmHead
from orchestrator.training.fast.ops.triton.launch import launch, wait_for_previous
from orchestrator.training.fast.sizes import MAX_LOGITS
from orchestrator.training.fast.step.flat_batch import FlatBatch


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, features = residual.shape
    total = residual if delta is None else torch.empty_like(residual)
    normed = torch.empty_like(residual)
    rstd = torch.empty(num_tokens, dtype=torch.float32, device=residual.device)
    launch(
        _add_norm,
        (num_tokens,),
        residual,
        residual if delta is None else delta,
        weight,
        total,
        normed,
        rstd,
        epsilon,
        features,
        HAS_DELTA=delta is not None,
        BLOCK=triton.next_power_of_2(features),
        num_warps=4 if features <= 2048 else 16,
    )
    return total, normed, rstd


def add_norm_backward(
    dresidual: torch.Tensor | None,
    dnormed: torch.Tensor,
    residual: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    num_tokens, features = residual.shape
    result = torch.empty_like(residual)
    launch(
        _add_norm_backward,
        (num_tokens,),
        residual if dresidual is None else dresidual,
        dnormed,
        residual,
        rstd,
        weight,
        result,
        features,
        HAS_RESIDUAL=dresidual is not None,
        BLOCK=triton.next_power_of_2(features),
        num_warps=8 if features <= 2048 else 16,
    )
    return result


def glu(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    num_tokens, features = len(gate_up), gate_up.shape[1] // 2
    y, grid = gate_up.new_empty(num_tokens, features), (num_tokens, triton.cdiv(features, 1024))
    launch(_glu, grid, gate_up, y, features, ACTIVATION=activation, BLOCK=1024)
    return y


def glu_backward(dy: torch.Tensor, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    num_tokens, features = dy.shape
    dgate_up, grid = torch.empty_like(gate_up), (num_tokens, triton.cdiv(features, 1024))
    launch(_glu_backward, grid, dy, gate_up, dgate_up, features, ACTIVATION=activation, BLOCK=1024)
    return dgate_up


def cross_entropy(
    hidden: torch.Tensor, lm_head: LmHead, batch: FlatBatch, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Implement `Ops.cross_entropy`. The gradient of the logits overwrites the logits, `MAX_LOGITS` at a time."""
    num_tokens, vocabulary = len(hidden), len(lm_head.weight)
    losses, hits = (torch.zeros(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
    tokens = batch.target_tokens.long()
    # Rows that fill the batch up read the last token, and write a row beyond all tokens. Their logits do not count.
    gathered = hidden.index_select(0, tokens.clamp(max=num_tokens - 1))
    chunk = min(len(tokens), max(1, MAX_LOGITS // vocabulary))
    for start in range(0, len(tokens), chunk):
        part = slice(start, min(start + chunk, len(tokens)))
        logits = F.linear(gathered[part], lm_head.weight)
        launch(
            _cross_entropy,
            (len(logits),),
            logits,
            batch.targets,
            batch.target_tokens,
            batch.tile_slots,
            batch.table["loss_weight"],
            losses,
            hits,
            1 / lm_head.divisor,
            lm_head.softcap or 0.0,
            start,
            num_tokens,
            vocabulary,
            WITH_GRADIENT=with_gradient,
            IS_SCALED=lm_head.divisor != 1,
            IS_CAPPED=lm_head.softcap is not None,
            TILE=batch.tile,
            BLOCK=4096,
            num_warps=8,
        )
        if with_gradient:  # over the hidden states, which are read no more
            torch.mm(logits, lm_head.weight, out=gathered[part])
        del logits  # before the next ones are allocated
    if not with_gradient:
        return losses, hits, None
    dhidden = hidden.new_zeros(num_tokens + 1, hidden.shape[1])
    return losses, hits, dhidden.index_copy_(0, tokens, gathered)[:num_tokens]


def sum_by_slot(values: torch.Tensor, batch: FlatBatch, num_slots: int) -> torch.Tensor:
    sums = torch.empty(num_slots, dtype=torch.float32, device=values.device)
    launch(_sum_by_slot, (num_slots,), values, batch.tile_slots, sums, len(values), TILE=batch.tile, BLOCK=1024)
    return sums


@triton.jit
def _add_norm(
    residual,  # (T, H)
    delta,  # (T, H); not read without HAS_DELTA
    weight,  # (H,)
    total,  # out: (T, H) residual + delta; not written without HAS_DELTA
    normed,  # out: (T, H)
    rstd,  # out: (T,) float32
    epsilon,
    features,  # H
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside, at = columns < features, token * features + columns
    state = tl.load(residual + at, mask=inside, other=0.0)
    if HAS_DELTA:
        state += tl.load(delta + at, mask=inside, other=0.0)
        tl.store(total + at, state, mask=inside)
    wide = state.to(tl.float32)
    reciprocal = tl.rsqrt(tl.sum(wide * wide) / features + epsilon)
    tl.store(rstd + token, reciprocal)
    # Rounded before the product, unless the weight is in float32.
    unit = (wide * reciprocal).to(weight.dtype.element_ty)
    tl.store(normed + at, (tl.load(weight + columns, mask=inside) * unit).to(state.dtype), mask=inside)


@triton.jit
def _add_norm_backward(
    dresidual,  # (T, H); not read without HAS_RESIDUAL
    dnormed,  # (T, H)
    residual,  # (T, H)
    rstd,  # (T,) float32
    weight,  # (H,)
    result,  # out: (T, H)
    features,  # H
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside, at = columns < features, token * features + columns
    reciprocal = tl.load(rstd + token)
    unit = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32) * reciprocal
    dunit = tl.load(dnormed + at, mask=inside, other=0.0) * tl.load(weight + columns, mask=inside, other=0.0)
    dunit = dunit.to(tl.float32)
    through_norm = (dunit - unit * (tl.sum(dunit * unit) / features)) * reciprocal
    gradient = through_norm.to(result.dtype.element_ty)
    if HAS_RESIDUAL:
        gradient = tl.load(dresidual + at, mask=inside) + gradient
    tl.store(result + at, gradient, mask=inside)


@triton.jit
def _glu(
    gate_up,  # (T, 2 I)
    y,  # out: (T, I)
    features,  # I
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    token, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    at_gate, at_up = _gate_and_up(gate_up + token * 2 * features, columns, features, ACTIVATION)
    gate, up = tl.load(at_gate, mask=inside, other=0.0), tl.load(at_up, mask=inside, other=0.0)
    if ACTIVATION == "clamped_silu":
        up = tl.clamp(up.to(tl.float32), -7.0, 7.0) + 1
    activated, _ = _activate(gate.to(tl.float32), ACTIVATION)
    tl.store(y + token * features + columns, (activated.to(gate.dtype) * up).to(gate.dtype), mask=inside)


@triton.jit
def _glu_backward(
    dy,  # (T, I)
    gate_up,  # (T, 2 I)
    dgate_up,  # out: (T, 2 I)
    features,  # I
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    token, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    at_gate, at_up = _gate_and_up(gate_up + token * 2 * features, columns, features, ACTIVATION)
    dproduct = tl.load(dy + token * features + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at_up, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activate(gate, ACTIVATION)
    dup = dproduct * activated
    if ACTIVATION == "clamped_silu":
        dup = tl.where(tl.abs(up) <= 7.0, dup, 0.0)
        up = tl.clamp(up, -7.0, 7.0) + 1
    at_gate, at_up = _gate_and_up(dgate_up + token * 2 * features, columns, features, ACTIVATION)
    tl.store(at_gate, (dproduct * up * slope).to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(at_up, dup.to(dgate_up.dtype.element_ty), mask=inside)


@triton.jit
def _gate_and_up(row, columns, features, ACTIVATION: tl.constexpr):
    """Return pointers to the gates and ups of a row's columns."""
    if ACTIVATION == "clamped_silu":
        gate, up = row + 2 * columns, row + 2 * columns + 1
    else:
        gate, up = row + columns, row + features + columns
    return gate, up


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Return the activation and its derivative: silu, that of gpt-oss, or gelu by tanh (arXiv 1606.08415)."""
    if ACTIVATION == "clamped_silu":
        clamped = tl.minimum(gate, 7.0)
        sigmoid = tl.sigmoid(1.702 * clamped)
        activated = clamped * sigmoid
        slope = tl.where(gate <= 7.0, sigmoid * (1 + 1.702 * clamped * (1 - sigmoid)), 0.0)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        activated, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:
        # gelu(g) = g / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (g + 0.044715 g^3).
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        half = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        activated = gate * half
        slope = half + gate * half * (1 - half) * 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
    return activated, slope


@triton.jit(do_not_specialize=["loss_weights", "start", "num_tokens"])
def _cross_entropy(
    logits,  # (tokens, V); with WITH_GRADIENT overwritten by their weighted gradient
    targets,  # (T,) int32
    target_tokens,  # (max_targets,) int32
    tile_slots,  # (T / TILE,) int32
    loss_weights,  # (S,) float32
    losses,  # out: (T,) float32; not written where there is no loss
    hits,  # out: (T,) float32; not written where there is no loss
    scale,  # factor of the logits
    softcap,  # limit of the logits
    start,  # first row of `logits` among the tokens with a loss
    num_tokens,  # T
    vocabulary,  # V
    WITH_GRADIENT: tl.constexpr,
    IS_SCALED: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the softmax in one pass over the logits ("online", arXiv 1805.02867), and its gradient in a second."""
    wait_for_previous()
    token = tl.load(target_tokens + start + tl.program_id(0))
    logits += tl.program_id(0).to(tl.int64) * vocabulary
    each = tl.arange(0, BLOCK)
    if token >= num_tokens:
        if WITH_GRADIENT:
            for first in range(0, vocabulary, BLOCK):
                tl.store(logits + first + each, tl.zeros((BLOCK,), logits.dtype.element_ty), first + each < vocabulary)
    else:
        target = tl.load(targets + token)
        target_logit, _ = _final_logit(tl.load(logits + target), scale, softcap, IS_SCALED, IS_CAPPED)
        row_max = target_logit
        sums = tl.zeros((BLOCK,), tl.float32)
        beaten = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, vocabulary, BLOCK):
            columns = first + each
            logit, _slope = _final_logit(
                tl.load(logits + columns, mask=columns < vocabulary, other=0.0), scale, softcap, IS_SCALED, IS_CAPPED
            )
            logit = tl.where(columns < vocabulary, logit, float("-inf"))
            beaten |= ((logit > target_logit) | ((logit == target_logit) & (columns < target))).to(tl.int32)
            before, row_max = row_max, tl.maximum(row_max, tl.max(logit))
            sums = sums * tl.exp(before - row_max) + tl.exp(logit - row_max)
        row_sum = tl.sum(sums)
        tl.store(losses + token, tl.log(row_sum) + row_max - target_logit)
        # A NaN is no hit, although no logit is larger.
        tl.store(hits + token, ((tl.max(beaten) == 0) & (target_logit == target_logit)).to(tl.float32))
        if WITH_GRADIENT:
            weight = tl.load(loss_weights + tl.load(tile_slots + token // TILE))
            for first in range(0, vocabulary, BLOCK):
                columns = first + each
                logit, slope = _final_logit(
                    tl.load(logits + columns, mask=columns < vocabulary, other=0.0),
                    scale,
                    softcap,
                    IS_SCALED,
                    IS_CAPPED,
                )
                dlogit = tl.exp(logit - row_max) / row_sum - (columns == target).to(tl.float32)
                tl.store(
                    logits + columns, (dlogit * slope * weight).to(logits.dtype.element_ty), mask=columns < vocabulary
                )


@triton.jit
def _final_logit(logit, scale, softcap, IS_SCALED: tl.constexpr, IS_CAPPED: tl.constexpr):
    """Scale and cap a logit in float32; also return the derivative."""
    logit, slope = logit.to(tl.float32), 1.0
    if IS_SCALED:
        logit, slope = logit * scale, scale
    if IS_CAPPED:
        tanh = 2 * tl.sigmoid(2 * logit / softcap) - 1
        logit, slope = softcap * tanh, slope * (1 - tanh * tanh)
    return logit, slope


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_by_slot(
    values,  # (T,) float32
    tile_slots,  # (T / TILE,) int32
    sums,  # out: (S,) float32
    num_tokens,  # T
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    slot = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tokens, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < num_tokens
        token_slots = tl.load(tile_slots + tokens // TILE, mask=inside, other=-1)
        total += tl.load(values + tokens, mask=inside & (token_slots == slot), other=0.0)
    tl.store(sums + slot, tl.sum(total))
