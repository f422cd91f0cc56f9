"""What the programs of `attention` share: the layout of a block, what a token sees, scores and rotation."""

import math

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@triton.jit
def query_rows(first_token, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return for each row of a block of queries its token, its query head, and whether that head exists."""
    row = tl.arange(0, ROWS * BLOCK_Q)
    return first_token + row // ROWS, kv_head * GROUP + row % ROWS, row % ROWS < GROUP


@triton.jit
def sequence_end(token, cu_seqlens, num_cu_seqlens, num_tokens):
    """Return the end of the sequence of a token: the smallest bound beyond it."""
    end = num_tokens
    for start in range(0, num_cu_seqlens, 128):
        index = start + tl.arange(0, 128)
        bound = tl.load(cu_seqlens + index, mask=index < num_cu_seqlens, other=0)
        end = tl.minimum(end, tl.min(tl.where(bound > token, bound, num_tokens)))
    return end


@triton.jit
def first_key(token, positions, WINDOW: tl.constexpr):
    """Return the first key that a token sees."""
    start = token - tl.load(positions + token)
    if WINDOW > 0:
        start = tl.maximum(start, token - WINDOW + 1)
    return start


@triton.jit
def visible_of(key, token, sequence_start, WINDOW: tl.constexpr):
    """Return which keys each token sees; keys and tokens have an axis each."""
    visible = (key <= token) & (key >= sequence_start)
    if WINDOW > 0:
        visible = visible & (key > token - WINDOW)
    return visible


@triton.jit
def scores_of(product, scale, SOFTCAP: tl.constexpr):
    """Return s in base 2 from q k^T, and the derivative of the cap."""
    if SOFTCAP > 0:
        tanh = 2 * tl.sigmoid(product * (2 * scale / SOFTCAP)) - 1
        s, slope = tanh * (SOFTCAP * LOG2_E), 1 - tanh * tanh
    else:
        s, slope = product * (scale * LOG2_E), 1.0
    return s, slope


@triton.jit
def features_of(HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the feature of a head in each of BLOCK_D columns. Features rotated together are BLOCK_D / 2 columns apart.

        column    0 ... ROTARY/2         ... HEAD_DIM/2            | the same in the second half
        feature   first of the rotated,  first of the others, none | second of the rotated, second of the others, none

    Columns without a feature, which `mask_of` leaves out, have any number.
    """
    column = tl.arange(0, BLOCK_D)
    if ROTARY == BLOCK_D:
        feature = column
    else:
        half, index = column // (BLOCK_D // 2), column % (BLOCK_D // 2)
        feature = index + tl.where(
            index < ROTARY // 2, half * (ROTARY // 2), half * (HEAD_DIM - ROTARY) // 2 + ROTARY // 2
        )
    return feature


@triton.jit
def mask_of(is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return which elements of a block (rows, BLOCK_D) exist."""
    mask = is_row[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) % (BLOCK_D // 2) < HEAD_DIM // 2)[None, :]
    return mask


@triton.jit
def angles(cos, sin, position, half, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return cosine and sine in float32 of the first half of the columns; 1 and 0 where nothing is rotated."""
    at = position * ROTARY + half  # the second half of the tables repeats the first
    if ROTARY == BLOCK_D:
        cosine, sine = tl.load(cos + at), tl.load(sin + at)
    else:
        cosine = tl.load(cos + at, mask=half < ROTARY // 2, other=1.0)
        sine = tl.load(sin + at, mask=half < ROTARY // 2, other=0.0)
    return cosine.to(tl.float32), sine.to(tl.float32)


@triton.jit
def load_do(
    doutput, output, lse, head, is_real, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return do (rows, D), delta (rows,) and lse (rows,); `head` is token * heads + head for each row."""
    at, mask = (
        head[:, None] * HEAD_DIM + features_of(HEAD_DIM, ROTARY, BLOCK_D)[None, :],
        mask_of(is_real, HEAD_DIM, BLOCK_D),
    )
    do = tl.load(doutput + at, mask=mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * tl.load(output + at, mask=mask, other=0.0).to(tl.float32), 1)
    return do, delta, tl.load(lse + head, mask=is_real, other=0.0)


@triton.jit
def store_unrotated(
    gradient, pointer, token, positions, cos, sin, is_real,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the gradient (rows, D) of rotated heads as that of the heads before rotation."""
    half = tl.arange(0, BLOCK_D // 2)[None, :]
    first, second = tl.split(tl.permute(tl.reshape(gradient, (gradient.shape[0], 2, BLOCK_D // 2)), (0, 2, 1)))
    cosine, sine = angles(cos, sin, tl.load(positions + token)[:, None], half, ROTARY, BLOCK_D)
    at, distance, mask = pointer[:, None] + half, HEAD_DIM // 2, is_real[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (half < HEAD_DIM // 2)
    if ROTARY < HEAD_DIM:
        at += tl.where(half < ROTARY // 2, 0, ROTARY // 2)
        distance = tl.where(half < ROTARY // 2, ROTARY // 2, (HEAD_DIM - ROTARY) // 2)
    tl.store(at, (first * cosine + second * sine).to(pointer.dtype.element_ty), mask=mask)
    tl.store(at + distance, (second * cosine - first * sine).to(pointer.dtype.element_ty), mask=mask)
