"""Attention over a flat row in Triton.

Sequences here are short (some hundred tokens), where an attention made for long ones spends its time on launches, and
on copies of keys for the heads that share them. A token sees the keys from its sequence's start to itself, which its
position tells: no padding, no mask in memory. Of the query heads that share a key head, those of a few tokens are the
rows of one product.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from orchestrator.training.fast.ops.reference import Heads
from orchestrator.training.fast.ops.triton.launch import FULL, after_previous, launch
from orchestrator.training.fast.step.flat_batch import FlatBatch

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Attended:
    """What attention's backward needs."""

    qkv: torch.Tensor
    """After rotation."""
    output: torch.Tensor
    logs: torch.Tensor
    """(T, queries) float32 logarithms to base 2 of the softmax's sums."""


def attention(qkv: torch.Tensor, row: FlatBatch, heads: Heads) -> tuple[torch.Tensor, Attended]:
    """Rotary positions (arXiv 2104.09864), then causal attention within each sequence (arXiv 2307.08691).

    Args:
        qkv: (T, (queries + 2 keys) * D), rotated in place and kept for the backward.

    Returns:
        (T, queries * D), and what the backward needs.
    """
    num_tokens, turned = len(qkv), heads.queries + heads.keys
    launch(
        _turn,
        (num_tokens,),
        qkv,
        row.positions,
        heads.cos,
        heads.sin,
        HEADS=turned,
        WIDTH=qkv.shape[1],
        SIZE=heads.size,
        BLOCK=triton.next_power_of_2(turned),
        num_warps=4 if turned * heads.size <= 4096 else 8,
    )
    output = qkv.new_empty(num_tokens, heads.queries * heads.size)
    logs = torch.empty(num_tokens, heads.queries, dtype=torch.float32, device=qkv.device)
    shape = _shape(heads)
    launch(
        _attend,
        (num_tokens // shape["BLOCK_T"], heads.keys),
        qkv,
        row.positions,
        output,
        logs,
        heads.size**-0.5,
        **shape,
        **_options(heads.size),
    )
    return output, Attended(qkv, output, logs)


def attention_backward(gradient: torch.Tensor, attended: Attended, row: FlatBatch, heads: Heads) -> torch.Tensor:
    """(T, queries * D) -> (T, (queries + 2 keys) * D)."""
    num_tokens, by_qkv, shape = len(gradient), torch.empty_like(attended.qkv), _shape(heads)
    group, options = shape["GROUP"], _backward_options(heads.size)
    each = group if row.num_slots >= FULL else 1
    parts = gradient.new_empty((2, *gradient.shape) if each < group else 1)
    num_key_blocks = num_tokens // options["BLOCK_S"] * heads.queries // each
    launch(
        _attend_backward,
        (num_key_blocks + num_tokens // shape["BLOCK_T"] * heads.keys,),
        gradient,
        attended.qkv,
        attended.output,
        attended.logs,
        by_qkv,
        parts,
        row.positions,
        row.bounds,
        heads.cos,
        heads.sin,
        heads.size**-0.5,
        num_tokens,
        len(row.bounds),
        EACH=each,
        **shape,
        **options,
    )
    if each < group:
        launch(_sum_heads, (num_tokens // 16, heads.keys),
            parts, by_qkv, row.positions, heads.cos, heads.sin, num_tokens,
            GROUP=group, KEYS=heads.keys, SIZE=heads.size, BLOCK_T=16,
        )  # fmt: skip
    return by_qkv


def _shape(heads: Heads) -> dict[str, int]:
    """Query heads of a key head, the same as a power of two, key heads, head size, tokens of a block of queries."""
    group = heads.queries // heads.keys
    rows = triton.next_power_of_2(group)
    return {"GROUP": group, "ROWS": rows, "KEYS": heads.keys, "SIZE": heads.size, "BLOCK_T": max(1, 64 // rows)}


def _options(size: int) -> dict[str, int]:
    return {"BLOCK_S": 64 if size <= 64 else 32, "num_warps": 4, "num_stages": 2 if size <= 64 else 3}


def _backward_options(size: int) -> dict[str, int]:
    return {"BLOCK_S": 64, "num_warps": 4, "num_stages": 1 if size <= 64 else 2}


@triton.jit
def _turn(
    qkv, positions, cos, sin,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    after_previous()
    token, half = tl.program_id(0), tl.arange(0, SIZE // 2)
    heads = tl.arange(0, BLOCK)[:, None]
    at = qkv + token * WIDTH + heads * SIZE + half[None, :]
    angle = tl.load(positions + token) * SIZE + half  # the tables' second half repeats the first
    cosine, sine = tl.load(cos + angle).to(tl.float32)[None, :], tl.load(sin + angle).to(tl.float32)[None, :]
    first = tl.load(at, mask=heads < HEADS, other=0.0)
    second = tl.load(at + SIZE // 2, mask=heads < HEADS, other=0.0)
    tl.store(at, (first * cosine - second * sine).to(first.dtype), mask=heads < HEADS)
    tl.store(at + SIZE // 2, (second * cosine + first * sine).to(first.dtype), mask=heads < HEADS)


@triton.jit
def _attend(
    qkv, positions, output, logs, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    after_previous()
    first_token, head = tl.program_id(0) * BLOCK_T, tl.program_id(1)
    heads: tl.constexpr = GROUP * KEYS
    width: tl.constexpr = (GROUP + 2) * KEYS * SIZE
    token, query_head, real = _rows(first_token, head, GROUP, ROWS, BLOCK_T)
    wide = tl.arange(0, SIZE)[None, :]
    query = tl.load(qkv + (token * width + query_head * SIZE)[:, None] + wide, mask=real[:, None], other=0.0)
    first_seen = token - tl.load(positions + token)
    highest = tl.full((ROWS * BLOCK_T,), -1e30, tl.float32)
    norm = tl.zeros((ROWS * BLOCK_T,), tl.float32)
    total = tl.zeros((ROWS * BLOCK_T, SIZE), tl.float32)
    end = first_token + BLOCK_T
    for start in range(first_token - tl.load(positions + first_token), end, BLOCK_S):
        seen = start + tl.arange(0, BLOCK_S)
        at = qkv + (seen * width + (heads + head) * SIZE)[:, None] + wide
        key = tl.load(at, mask=seen[:, None] < end, other=0.0)
        value = tl.load(at + KEYS * SIZE, mask=seen[:, None] < end, other=0.0)
        score = tl.dot(query, key.T, input_precision="ieee") * (scale * LOG2_E)
        visible = (seen[None, :] <= token[:, None]) & (seen[None, :] >= first_seen[:, None])
        score = tl.where(visible, score, float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(score, 1))
        share = tl.exp2(score - highest[:, None])
        fade = tl.exp2(before - highest)
        norm = norm * fade + tl.sum(share, 1)
        total = tl.dot(share.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
    tl.store(logs + token * heads + query_head, highest + tl.log2(norm), mask=real)
    at_output = output + ((token * heads + query_head) * SIZE)[:, None] + wide
    tl.store(at_output, (total / norm[:, None]).to(output.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["num_bounds"])
def _attend_backward(
    gradient, qkv, output, logs, by_qkv, parts, positions, bounds, cos, sin, scale, num_tokens, num_bounds,
    EACH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    after_previous()
    per_block: tl.constexpr = GROUP * KEYS // EACH
    program, num_key_blocks = tl.program_id(0), num_tokens // BLOCK_S * per_block
    if program < num_key_blocks:
        block, head = program // per_block, program % per_block * EACH
        end = _end_after((block + 1) * BLOCK_S - 1, bounds, num_bounds, num_tokens)
        _keys_backward(
            block * BLOCK_S, end, head, gradient, qkv, output, logs, by_qkv, parts, positions, cos, sin, scale,
            num_tokens, EACH, GROUP, KEYS, SIZE, BLOCK_S,
        )  # fmt: skip
    else:
        block, head = (program - num_key_blocks) // KEYS, (program - num_key_blocks) % KEYS
        _queries_backward(
            block * BLOCK_T, head, gradient, qkv, output, logs, by_qkv, positions, cos, sin, scale,
            GROUP, ROWS, KEYS, SIZE, BLOCK_T, BLOCK_S,
        )  # fmt: skip


@triton.jit
def _keys_backward(
    first_token, end, head, gradient, qkv, output, logs, by_qkv, parts, positions, cos, sin, scale, num_tokens,
    EACH: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values by EACH query heads: over the tokens that see them."""
    heads: tl.constexpr = GROUP * KEYS
    width: tl.constexpr = (GROUP + 2) * KEYS * SIZE
    wide = tl.arange(0, SIZE)[None, :]
    seen = first_token + tl.arange(0, BLOCK)
    at_key = (seen * width + (heads + head // GROUP) * SIZE)[:, None] + wide
    key, value = tl.load(qkv + at_key), tl.load(qkv + at_key + KEYS * SIZE)
    by_key = tl.zeros((BLOCK, SIZE), tl.float32)
    by_value = tl.zeros((BLOCK, SIZE), tl.float32)
    for each in range(EACH):
        for start in range(first_token, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            real = token < end
            at_query = token * width + (head + each) * SIZE
            query = tl.load(qkv + at_query[:, None] + wide, mask=real[:, None], other=0.0)
            by_output, delta, log = _arrived(gradient, output, logs, token * heads + head + each, real, SIZE)
            score = tl.dot(key, query.T, input_precision="ieee") * (scale * LOG2_E)
            first_seen = token - tl.load(positions + token, mask=real, other=0)
            visible = (seen[:, None] <= token[None, :]) & (seen[:, None] >= first_seen[None, :]) & real[None, :]
            share = tl.where(visible, tl.exp2(score - log[None, :]), 0.0)
            by_value = tl.dot(share.to(by_output.dtype), by_output, by_value, input_precision="ieee")
            by_share = tl.dot(value, by_output.T, input_precision="ieee")
            by_score = (share * (by_share - delta[None, :])).to(query.dtype)
            by_key = tl.dot(by_score, query, by_key, input_precision="ieee")
    by_key *= scale
    if EACH == GROUP:
        key_head = heads + head // GROUP
        _turn_back(by_key, by_qkv + seen * width + key_head * SIZE, seen, positions, cos, sin, seen < end, SIZE)
        tl.store(by_qkv + at_key + KEYS * SIZE, by_value.to(by_qkv.dtype.element_ty))
    else:
        at = parts + ((seen * heads + head) * SIZE)[:, None] + wide
        tl.store(at, by_key.to(parts.dtype.element_ty))
        tl.store(at + num_tokens * heads * SIZE, by_value.to(parts.dtype.element_ty))


@triton.jit
def _queries_backward(
    first_token, head, gradient, qkv, output, logs, by_qkv, positions, cos, sin, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries: over the keys that they see."""
    heads: tl.constexpr = GROUP * KEYS
    width: tl.constexpr = (GROUP + 2) * KEYS * SIZE
    wide = tl.arange(0, SIZE)[None, :]
    token, query_head, real = _rows(first_token, head, GROUP, ROWS, BLOCK_T)
    at_query = token * width + query_head * SIZE
    query = tl.load(qkv + at_query[:, None] + wide, mask=real[:, None], other=0.0)
    first_seen = token - tl.load(positions + token)
    by_output, delta, log = _arrived(gradient, output, logs, token * heads + query_head, real, SIZE)
    by_query = tl.zeros((ROWS * BLOCK_T, SIZE), tl.float32)
    end = first_token + BLOCK_T
    for start in range(first_token - tl.load(positions + first_token), end, BLOCK_S):
        seen = start + tl.arange(0, BLOCK_S)
        at = qkv + (seen * width + (heads + head) * SIZE)[:, None] + wide
        key = tl.load(at, mask=seen[:, None] < end, other=0.0)
        value = tl.load(at + KEYS * SIZE, mask=seen[:, None] < end, other=0.0)
        score = tl.dot(query, key.T, input_precision="ieee") * (scale * LOG2_E)
        visible = (seen[None, :] <= token[:, None]) & (seen[None, :] >= first_seen[:, None])
        share = tl.where(visible, tl.exp2(score - log[:, None]), 0.0)
        by_share = tl.dot(by_output, value.T, input_precision="ieee")
        by_score = (share * (by_share - delta[:, None])).to(key.dtype)
        by_query = tl.dot(by_score, key, by_query, input_precision="ieee")
    _turn_back(by_query * scale, by_qkv + at_query, token, positions, cos, sin, real, SIZE)


@triton.jit
def _sum_heads(
    parts, by_qkv, positions, cos, sin, num_tokens,
    GROUP: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: sums over the query heads that share them."""
    after_previous()
    heads: tl.constexpr = GROUP * KEYS
    width: tl.constexpr = (GROUP + 2) * KEYS * SIZE
    token, head = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1)
    wide = tl.arange(0, SIZE)[None, :]
    by_key = tl.zeros((BLOCK_T, SIZE), tl.float32)
    by_value = tl.zeros((BLOCK_T, SIZE), tl.float32)
    for each in tl.static_range(GROUP):
        at = parts + ((token * heads + head * GROUP + each) * SIZE)[:, None] + wide
        by_key += tl.load(at).to(tl.float32)
        by_value += tl.load(at + num_tokens * heads * SIZE).to(tl.float32)
    at_key = by_qkv + token * width + (heads + head) * SIZE
    _turn_back(by_key, at_key, token, positions, cos, sin, token < num_tokens, SIZE)
    tl.store((at_key + KEYS * SIZE)[:, None] + wide, by_value.to(by_qkv.dtype.element_ty))


@triton.jit
def _rows(first_token, head, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of each row of a block of queries: its token, its query head, and whether there is such a one."""
    row = tl.arange(0, ROWS * BLOCK_T)
    return first_token + row // ROWS, head * GROUP + row % ROWS, row % ROWS < GROUP


@triton.jit
def _end_after(token, bounds, num_bounds, num_tokens):
    """End of this token's sequence."""
    end = num_tokens
    for start in range(0, num_bounds, 128):
        index = start + tl.arange(0, 128)
        bound = tl.load(bounds + index, mask=index < num_bounds, other=0)
        end = tl.minimum(end, tl.min(tl.where(bound > token, bound, num_tokens)))
    return end


@triton.jit
def _arrived(gradient, output, logs, head, real, SIZE: tl.constexpr):
    """The output's gradient (rows, D), its product with the output, and the softmax's logarithm, (rows,) each."""
    at = head[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    by_output = tl.load(gradient + at, mask=real[:, None], other=0.0)
    delta = tl.sum(by_output.to(tl.float32) * tl.load(output + at, mask=real[:, None], other=0.0).to(tl.float32), 1)
    return by_output, delta, tl.load(logs + head, mask=real, other=0.0)


@triton.jit
def _turn_back(states, pointer, token, positions, cos, sin, real, SIZE: tl.constexpr):
    """Write (rows, D) gradients as they were before rotation."""
    half = tl.arange(0, SIZE // 2)[None, :]
    first, second = tl.split(tl.permute(tl.reshape(states, (states.shape[0], 2, SIZE // 2)), (0, 2, 1)))
    angle = tl.load(positions + token)[:, None] * SIZE + half
    cosine, sine = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
    at = pointer[:, None] + half
    tl.store(at, (first * cosine + second * sine).to(pointer.dtype.element_ty), mask=real[:, None])
    tl.store(at + SIZE // 2, (second * cosine - first * sine).to(pointer.dtype.element_ty), mask=real[:, None])
