"""Attention over a flat batch in Triton, in the manner of FlashAttention-2 (arXiv 2307.08691).

Sequences are short here, some hundred tokens. An attention made for long ones spends its time on launches, and on
copies of keys for the query heads that share them. FlashAttention-2 itself (`varlen_attn`) took 19.4 us forward and
53.6 us backward at 1.1B on an H200, these kernels 11.3 and 22.8 (docs/log.md, 2026-11-23).

A token sees the keys from the start of its sequence to itself. The start is known from its position: no padding, and no
mask in memory. The query heads that share a key head are rows of the same product:

    one program of _forward, for a key head        keys of BLOCK_KV tokens per iteration
                                                   t0 ... t63 | t64 ... t127 | ...
      rows: BLOCK_Q tokens x ROWS query heads    +------------+--------------+
        token 64, head 0                         |  visible   | visible to   |
        token 64, head 1                         |  if of the | the diagonal |
        token 65, head 0                         |  same      |              |
        ...                                      |  sequence  |              |
                                                 +------------+--------------+

ROWS is the number of query heads that share a key head, rounded up to a power of two; rows beyond it are masked.

The backward is one launch of two kinds of programs. `_dkv` has a block of keys and goes over the tokens that see them;
`_dq` has a block of queries and goes over the keys that they see. With few slots, `_dkv` has a program for each query
head, whose parts `_sum_dkv` adds up, so that the device is full. With many slots one program sums all query heads of a
key head, which saves these parts: 10.1 -> 7.6 ms a step (docs/log.md, 2026-11-26). Other block sizes
gained 3% and were not kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.protocol import AttentionConfig
from orchestrator.training.fast.ops.triton.attention_common import (
    LOG2_E,
    angles,
    features_of,
    first_key,
    load_do,
    mask_of,
    query_rows,
    scores_of,
    sequence_end,
    store_unrotated,
    visible_of,
)
from orchestrator.training.fast.ops.triton.launch import MANY_SLOTS, launch, wait_for_previous
from orchestrator.training.fast.step.flat_batch import FlatBatch


def attention(
    qkv: torch.Tensor, batch: FlatBatch, config: AttentionConfig, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Implement `Ops.attention`. Queries and keys are rotated in place.

    The saved tensors are `qkv` after rotation; the output; and `lse` (T, num_heads) float32, the base-2 logarithm of
    the softmax's denominator. A sink is a term of the denominator, so that the backward has no other trace of it.
    """
    num_tokens, rotated_heads = len(qkv), config.num_heads + config.num_kv_heads
    launch(
        _rotate,
        (num_tokens,),
        qkv,
        batch.positions,
        config.cos,
        config.sin,
        HEADS=rotated_heads,
        WIDTH=qkv.shape[1],
        HEAD_DIM=config.head_dim,
        ROTARY=config.cos.shape[1],
        BLOCK=triton.next_power_of_2(rotated_heads),
        BLOCK_D=triton.next_power_of_2(config.cos.shape[1]),
        num_warps=4 if rotated_heads * config.head_dim <= 4096 else 8,
    )
    output = qkv.new_empty(num_tokens, config.num_heads * config.head_dim)
    lse = torch.empty(num_tokens, config.num_heads, dtype=torch.float32, device=qkv.device)
    shape = _shape(config)
    launch(
        _forward,
        (num_tokens // shape["BLOCK_Q"], config.num_kv_heads),
        qkv,
        batch.positions,
        output,
        lse,
        qkv if sinks is None else sinks,
        config.scale,
        HAS_SINKS=sinks is not None,
        **shape,
        **_options(shape["BLOCK_D"]),
    )
    return output, (qkv, output, lse)


def attention_backward(
    do: torch.Tensor, saved: tuple[torch.Tensor, ...], batch: FlatBatch, config: AttentionConfig
) -> torch.Tensor:
    qkv, output, lse = saved
    num_tokens, dqkv, shape = len(do), torch.empty_like(qkv), _shape(config)
    group, options = shape["GROUP"], _backward_options(shape["BLOCK_D"])
    heads_per_program = group if batch.num_slots >= MANY_SLOTS else 1
    dkv_parts = do.new_empty((2, *do.shape) if heads_per_program < group else 1)
    num_key_blocks = num_tokens // options["BLOCK_KV"] * config.num_heads // heads_per_program
    launch(
        _backward,
        (num_key_blocks + num_tokens // shape["BLOCK_Q"] * config.num_kv_heads,),
        do,
        qkv,
        output,
        lse,
        dqkv,
        dkv_parts,
        batch.positions,
        batch.cu_seqlens,
        config.cos,
        config.sin,
        config.scale,
        num_tokens,
        len(batch.cu_seqlens),
        HEADS_PER_PROGRAM=heads_per_program,
        **shape,
        **options,
    )
    if heads_per_program < group:
        launch(_sum_dkv, (num_tokens // 16, config.num_kv_heads),
            dkv_parts, dqkv, batch.positions, config.cos, config.sin, num_tokens,
            GROUP=group, KV_HEADS=config.num_kv_heads, HEAD_DIM=config.head_dim, ROTARY=shape["ROTARY"],
            BLOCK_D=shape["BLOCK_D"], BLOCK_Q=16,
        )  # fmt: skip
    return dqkv


def _shape(config: AttentionConfig) -> dict[str, Any]:
    """Return what the kernels are compiled for.

    GROUP query heads share a key head; ROWS is the same rounded up to a power of two; BLOCK_Q is the tokens of a block
    of queries, such that a block has 64 rows. BLOCK_D is the head size rounded up to a power of two. Without a window
    or a cap, WINDOW or SOFTCAP is 0.
    """
    group = config.num_heads // config.num_kv_heads
    rows = triton.next_power_of_2(group)
    return {
        "GROUP": group,
        "ROWS": rows,
        "KV_HEADS": config.num_kv_heads,
        "HEAD_DIM": config.head_dim,
        "ROTARY": config.cos.shape[1],
        "WINDOW": config.window or 0,
        "SOFTCAP": config.softcap or 0.0,
        "BLOCK_D": triton.next_power_of_2(config.head_dim),
        "BLOCK_Q": max(1, 64 // rows),
    }


def _options(block_d: int) -> dict[str, int]:
    if block_d <= 64:
        return {"BLOCK_KV": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_KV": 32, "num_warps": 4, "num_stages": 3} if block_d == 128 else _WIDE


def _backward_options(block_d: int) -> dict[str, int]:
    return {"BLOCK_KV": 64, "num_warps": 4, "num_stages": 1 if block_d <= 64 else 2} if block_d <= 128 else _WIDE


_WIDE = {"BLOCK_KV": 32, "num_warps": 8, "num_stages": 1}
"""Options for heads of more than 128 features, whose blocks must fit into the shared memory of a multiprocessor."""


# Pointers of the kernels below, with their shapes (heads = GROUP * KV_HEADS, D = HEAD_DIM):
#   qkv, dqkv       (T, (heads + 2 KV_HEADS) * D)
#   output, doutput (T, heads * D)
#   lse             (T, heads) float32
#   dkv_parts       (2, T, heads * D): dk and dv of each query head
#   positions       (T,) int32
#   cu_seqlens      (num_cu_seqlens,) int32
#   cos, sin        (positions, ROTARY)
#   sinks           (heads,), unless HAS_SINKS is false
# Columns of a block are features of a head in the order of `features_of`. Names in the programs are the paper's:
# s = q k^T, p = softmax(s), delta = rowsum(do * o), ds = p * (dp - delta).


@triton.jit
def _rotate(
    qkv, positions, cos, sin,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate the first ROTARY features of the query and key heads of one token in place (arXiv 2104.09864)."""
    wait_for_previous()
    token, half = tl.program_id(0), tl.arange(0, BLOCK_D // 2)
    heads = tl.arange(0, BLOCK)[:, None]
    is_real = heads < HEADS
    if BLOCK_D > ROTARY:
        is_real = is_real & (half < ROTARY // 2)[None, :]
    at = qkv + token * WIDTH + heads * HEAD_DIM + half[None, :]
    cosine, sine = angles(cos, sin, tl.load(positions + token), half, ROTARY, BLOCK_D)
    first = tl.load(at, mask=is_real, other=0.0)
    second = tl.load(at + ROTARY // 2, mask=is_real, other=0.0)
    tl.store(at, (first * cosine[None, :] - second * sine[None, :]).to(first.dtype), mask=is_real)
    tl.store(at + ROTARY // 2, (second * cosine[None, :] + first * sine[None, :]).to(first.dtype), mask=is_real)


@triton.jit
def _forward(
    qkv, positions, output, lse, sinks, scale,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Compute the output of BLOCK_Q tokens, for the query heads of one key head. Grid (T / BLOCK_Q, KV_HEADS)."""
    wait_for_previous()
    first_token, kv_head = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    heads: tl.constexpr = GROUP * KV_HEADS
    width: tl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    token, head, is_real = query_rows(first_token, kv_head, GROUP, ROWS, BLOCK_Q)
    features = features_of(HEAD_DIM, ROTARY, BLOCK_D)[None, :]
    is_query = mask_of(is_real, HEAD_DIM, BLOCK_D)
    q = tl.load(qkv + (token * width + head * HEAD_DIM)[:, None] + features, mask=is_query, other=0.0)
    sequence_start = token - tl.load(positions + token)
    row_max = tl.full((ROWS * BLOCK_Q,), -1e30, tl.float32)
    row_sum = tl.zeros((ROWS * BLOCK_Q,), tl.float32)
    o = tl.zeros((ROWS * BLOCK_Q, BLOCK_D), tl.float32)
    end = first_token + BLOCK_Q
    for start in range(first_key(first_token, positions, WINDOW), end, BLOCK_KV):
        key = start + tl.arange(0, BLOCK_KV)
        at = qkv + (key * width + (heads + kv_head) * HEAD_DIM)[:, None] + features
        is_key = mask_of(key < end, HEAD_DIM, BLOCK_D)
        k = tl.load(at, mask=is_key, other=0.0)
        v = tl.load(at + KV_HEADS * HEAD_DIM, mask=is_key, other=0.0)
        s, _ = scores_of(tl.dot(q, k.T, input_precision="ieee"), scale, SOFTCAP)
        visible = visible_of(key[None, :], token[:, None], sequence_start[:, None], WINDOW)
        s = tl.where(visible, s, float("-inf"))
        before, row_max = row_max, tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - row_max[:, None])
        rescale = tl.exp2(before - row_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_real, other=0.0).to(tl.float32) * LOG2_E
        before, row_max = row_max, tl.maximum(row_max, sink)
        rescale = tl.exp2(before - row_max)
        row_sum = row_sum * rescale + tl.exp2(sink - row_max)
        o = o * rescale[:, None]
    tl.store(lse + token * heads + head, row_max + tl.log2(row_sum), mask=is_real)
    at_output = output + ((token * heads + head) * HEAD_DIM)[:, None] + features
    tl.store(at_output, (o / row_sum[:, None]).to(output.dtype.element_ty), mask=is_query)


@triton.jit(do_not_specialize=["num_cu_seqlens"])
def _backward(
    doutput, qkv, output, lse, dqkv, dkv_parts, positions, cu_seqlens, cos, sin, scale, num_tokens, num_cu_seqlens,
    HEADS_PER_PROGRAM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Share the grid: first the programs of `_dkv`, then those of `_dq`."""
    wait_for_previous()
    per_block: tl.constexpr = GROUP * KV_HEADS // HEADS_PER_PROGRAM
    program, num_key_blocks = tl.program_id(0), num_tokens // BLOCK_KV * per_block
    if program < num_key_blocks:
        block, head = program // per_block, program % per_block * HEADS_PER_PROGRAM
        end = sequence_end((block + 1) * BLOCK_KV - 1, cu_seqlens, num_cu_seqlens, num_tokens)
        if WINDOW > 0:
            end = tl.minimum(end, (block + 1) * BLOCK_KV + WINDOW - 1)
        _dkv(
            block * BLOCK_KV, end, head, doutput, qkv, output, lse, dqkv, dkv_parts, positions, cos, sin, scale,
            num_tokens, HEADS_PER_PROGRAM, GROUP, KV_HEADS, HEAD_DIM, ROTARY, WINDOW, SOFTCAP, BLOCK_D, BLOCK_KV,
        )  # fmt: skip
    else:
        block, head = (program - num_key_blocks) // KV_HEADS, (program - num_key_blocks) % KV_HEADS  # a key head
        _dq(
            block * BLOCK_Q, head, doutput, qkv, output, lse, dqkv, positions, cos, sin, scale,
            GROUP, ROWS, KV_HEADS, HEAD_DIM, ROTARY, WINDOW, SOFTCAP, BLOCK_D, BLOCK_Q, BLOCK_KV,
        )  # fmt: skip


@triton.jit
def _dkv(
    first_token, end, first_head, doutput, qkv, output, lse, dqkv, dkv_parts, positions, cos, sin, scale, num_tokens,
    HEADS_PER_PROGRAM: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of BLOCK keys from HEADS_PER_PROGRAM query heads: sums over the tokens that see the keys."""
    heads: tl.constexpr = GROUP * KV_HEADS
    width: tl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    features = features_of(HEAD_DIM, ROTARY, BLOCK_D)[None, :]
    key = first_token + tl.arange(0, BLOCK)
    at_key = (key * width + (heads + first_head // GROUP) * HEAD_DIM)[:, None] + features
    is_key = mask_of(key < end, HEAD_DIM, BLOCK_D)
    k = tl.load(qkv + at_key, mask=is_key, other=0.0)
    v = tl.load(qkv + at_key + KV_HEADS * HEAD_DIM, mask=is_key, other=0.0)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for each in range(HEADS_PER_PROGRAM):
        for start in range(first_token, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            is_real = token < end
            at_query = token * width + (first_head + each) * HEAD_DIM
            is_query = mask_of(is_real, HEAD_DIM, BLOCK_D)
            q = tl.load(qkv + at_query[:, None] + features, mask=is_query, other=0.0)
            head = token * heads + first_head + each
            do, delta, row_lse = load_do(doutput, output, lse, head, is_real, HEAD_DIM, ROTARY, BLOCK_D)
            s, slope = scores_of(tl.dot(k, q.T, input_precision="ieee"), scale, SOFTCAP)
            sequence_start = token - tl.load(positions + token, mask=is_real, other=0)
            visible = visible_of(key[:, None], token[None, :], sequence_start[None, :], WINDOW) & is_real[None, :]
            p = tl.where(visible, tl.exp2(s - row_lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, do.T, input_precision="ieee")
            ds = (p * (dp - delta[None, :]) * slope).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk *= scale
    if HEADS_PER_PROGRAM == GROUP:
        at = dqkv + key * width + (heads + first_head // GROUP) * HEAD_DIM
        store_unrotated(dk, at, key, positions, cos, sin, key < end, HEAD_DIM, ROTARY, BLOCK_D)
        tl.store(dqkv + at_key + KV_HEADS * HEAD_DIM, dv.to(dqkv.dtype.element_ty), mask=is_key)
    else:
        at = dkv_parts + ((key * heads + first_head) * HEAD_DIM)[:, None] + features
        tl.store(at, dk.to(dkv_parts.dtype.element_ty), mask=is_key)
        tl.store(at + num_tokens * heads * HEAD_DIM, dv.to(dkv_parts.dtype.element_ty), mask=is_key)


@triton.jit
def _dq(
    first_token, kv_head, doutput, qkv, output, lse, dqkv, positions, cos, sin, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Compute dq of BLOCK_Q tokens, for the query heads of one key head: sums over the keys that they see."""
    heads: tl.constexpr = GROUP * KV_HEADS
    width: tl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    features = features_of(HEAD_DIM, ROTARY, BLOCK_D)[None, :]
    token, head, is_real = query_rows(first_token, kv_head, GROUP, ROWS, BLOCK_Q)
    at_query = token * width + head * HEAD_DIM
    q = tl.load(qkv + at_query[:, None] + features, mask=mask_of(is_real, HEAD_DIM, BLOCK_D), other=0.0)
    sequence_start = token - tl.load(positions + token)
    do, delta, row_lse = load_do(doutput, output, lse, token * heads + head, is_real, HEAD_DIM, ROTARY, BLOCK_D)
    dq = tl.zeros((ROWS * BLOCK_Q, BLOCK_D), tl.float32)
    end = first_token + BLOCK_Q
    for start in range(first_key(first_token, positions, WINDOW), end, BLOCK_KV):
        key = start + tl.arange(0, BLOCK_KV)
        at = qkv + (key * width + (heads + kv_head) * HEAD_DIM)[:, None] + features
        is_key = mask_of(key < end, HEAD_DIM, BLOCK_D)
        k = tl.load(at, mask=is_key, other=0.0)
        v = tl.load(at + KV_HEADS * HEAD_DIM, mask=is_key, other=0.0)
        s, slope = scores_of(tl.dot(q, k.T, input_precision="ieee"), scale, SOFTCAP)
        visible = visible_of(key[None, :], token[:, None], sequence_start[:, None], WINDOW)
        p = tl.where(visible, tl.exp2(s - row_lse[:, None]), 0.0)
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = (p * (dp - delta[:, None]) * slope).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    store_unrotated(dq * scale, dqkv + at_query, token, positions, cos, sin, is_real, HEAD_DIM, ROTARY, BLOCK_D)


@triton.jit
def _sum_dkv(
    dkv_parts, dqkv, positions, cos, sin, num_tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Sum dk and dv over the query heads that share a key head. Grid (T / BLOCK_Q, KV_HEADS)."""
    wait_for_previous()
    heads: tl.constexpr = GROUP * KV_HEADS
    width: tl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    token, kv_head = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.program_id(1)
    features, is_real = features_of(HEAD_DIM, ROTARY, BLOCK_D)[None, :], mask_of(token < num_tokens, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for each in tl.static_range(GROUP):
        at = dkv_parts + ((token * heads + kv_head * GROUP + each) * HEAD_DIM)[:, None] + features
        dk += tl.load(at, mask=is_real, other=0.0).to(tl.float32)
        dv += tl.load(at + num_tokens * heads * HEAD_DIM, mask=is_real, other=0.0).to(tl.float32)
    at_key = dqkv + token * width + (heads + kv_head) * HEAD_DIM
    store_unrotated(dk, at_key, token, positions, cos, sin, token < num_tokens, HEAD_DIM, ROTARY, BLOCK_D)
    tl.store((at_key + KV_HEADS * HEAD_DIM)[:, None] + features, dv.to(dqkv.dtype.element_ty), mask=is_real)
