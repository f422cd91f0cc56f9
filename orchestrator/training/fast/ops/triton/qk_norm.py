"""Norms of queries and keys in Triton: grid (T, 2), one program for the queries of a token and one for its keys."""

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.protocol import AttentionConfig
from orchestrator.training.fast.ops.triton.launch import launch, wait_for_previous


def qk_norm(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, epsilon: float, config: AttentionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, shape = torch.empty_like(qkv), _qk_norm_shape(q_weight, k_weight, config)
    norms = shape["Q_NORMS"] + shape["K_NORMS"]
    rstd = torch.empty(len(qkv), norms, dtype=torch.float32, device=qkv.device)
    launch(_qk_norm, (len(qkv), 2), qkv, q_weight, k_weight, normed, rstd, epsilon, **shape)
    return normed, rstd


def qk_norm_backward_(
    dqkv: torch.Tensor,
    qkv: torch.Tensor,
    rstd: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    config: AttentionConfig,
) -> None:
    shape = _qk_norm_shape(q_weight, k_weight, config)
    launch(_qk_norm_backward, (len(qkv), 2), dqkv, qkv, rstd, q_weight, k_weight, **shape)


def _qk_norm_shape(q_weight: torch.Tensor, k_weight: torch.Tensor, config: AttentionConfig) -> dict[str, int]:
    """Return the sizes that the kernels are compiled for, and the number of warps."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "Q_NORMS": width // len(q_weight),
        "K_NORMS": kv_width // len(k_weight),
        "Q_SIZE": len(q_weight),
        "K_SIZE": len(k_weight),
        "KV_WIDTH": kv_width,
        "num_warps": 4 if width <= 4096 else 8,
    }


@triton.jit
def _qk_norm(
    qkv,  # (T, Q_NORMS * Q_SIZE + 2 KV_WIDTH)
    q_weight,  # (Q_SIZE,)
    k_weight,  # (K_SIZE,)
    normed,  # out: as qkv
    rstd,  # out: (T, Q_NORMS + K_NORMS) float32
    epsilon,
    Q_NORMS: tl.constexpr,
    K_NORMS: tl.constexpr,
    Q_SIZE: tl.constexpr,
    K_SIZE: tl.constexpr,
    KV_WIDTH: tl.constexpr,
):
    wait_for_previous()
    width: tl.constexpr = Q_NORMS * Q_SIZE
    at, rstd_at = tl.program_id(0) * (width + 2 * KV_WIDTH), tl.program_id(0) * (Q_NORMS + K_NORMS)
    if tl.program_id(1) == 0:
        _norm_parts(qkv + at, q_weight, normed + at, rstd + rstd_at, epsilon, Q_NORMS, Q_SIZE)
    else:
        keys = at + width
        _norm_parts(qkv + keys, k_weight, normed + keys, rstd + rstd_at + Q_NORMS, epsilon, K_NORMS, K_SIZE)
        column = tl.arange(0, triton.next_power_of_2(KV_WIDTH))
        values = keys + KV_WIDTH + column
        tl.store(normed + values, tl.load(qkv + values, mask=column < KV_WIDTH), mask=column < KV_WIDTH)


@triton.jit
def _norm_parts(x, weight, y, rstd, epsilon, NORMS: tl.constexpr, SIZE: tl.constexpr):
    """Normalize NORMS parts of SIZE features, one after another in memory."""
    part = tl.arange(0, triton.next_power_of_2(NORMS))
    column = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    inside, at = (part[:, None] < NORMS) & (column < SIZE), part[:, None] * SIZE + column
    state = tl.load(x + at, mask=inside, other=0.0)
    wide = state.to(tl.float32)
    reciprocal = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + epsilon)
    tl.store(rstd + part, reciprocal, mask=part < NORMS)
    unit = (wide * reciprocal[:, None]).to(weight.dtype.element_ty)
    factor = tl.load(weight + column, mask=column < SIZE, other=0.0)
    tl.store(y + at, (factor * unit).to(state.dtype), mask=inside)


@triton.jit
def _qk_norm_backward(
    dqkv,  # in and out: (T, Q_NORMS * Q_SIZE + 2 KV_WIDTH)
    qkv,  # as dqkv
    rstd,  # (T, Q_NORMS + K_NORMS) float32
    q_weight,  # (Q_SIZE,)
    k_weight,  # (K_SIZE,)
    Q_NORMS: tl.constexpr,
    K_NORMS: tl.constexpr,
    Q_SIZE: tl.constexpr,
    K_SIZE: tl.constexpr,
    KV_WIDTH: tl.constexpr,
):
    wait_for_previous()
    width: tl.constexpr = Q_NORMS * Q_SIZE
    at, rstd_at = tl.program_id(0) * (width + 2 * KV_WIDTH), tl.program_id(0) * (Q_NORMS + K_NORMS)
    if tl.program_id(1) == 0:
        _norm_parts_backward(dqkv + at, qkv + at, rstd + rstd_at, q_weight, Q_NORMS, Q_SIZE)
    else:
        keys = at + width
        _norm_parts_backward(dqkv + keys, qkv + keys, rstd + rstd_at + Q_NORMS, k_weight, K_NORMS, K_SIZE)


@triton.jit
def _norm_parts_backward(gradient, x, rstd, weight, NORMS: tl.constexpr, SIZE: tl.constexpr):
    """Replace the gradient of the result of `_norm_parts` by that of its input."""
    part = tl.arange(0, triton.next_power_of_2(NORMS))
    column = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    inside, at = (part[:, None] < NORMS) & (column < SIZE), part[:, None] * SIZE + column
    reciprocal = tl.load(rstd + part, mask=part < NORMS, other=0.0)[:, None]
    unit = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * reciprocal
    dunit = tl.load(gradient + at, mask=inside, other=0.0) * tl.load(weight + column, mask=column < SIZE, other=0.0)
    dunit = dunit.to(tl.float32)
    dx = (dunit - unit * (tl.sum(dunit * unit, 1) / SIZE)[:, None]) * reciprocal
    tl.store(gradient + at, dx.to(gradient.dtype.element_ty), mask=inside)
