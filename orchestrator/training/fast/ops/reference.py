"""The operations in plain PyTorch: what a CPU runs, and what the Triton kernels are tested against.

This module satisfies `protocol.Ops`, where the shapes are. Autograd is used for attention only; every other operation
has its backward written out below its forward.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from orchestrator.training.fast.families.family import Activation
from orchestrator.training.fast.ops.protocol import AttentionConfig, LmHead
from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch

TILE = 8
"""Tokens of a tile."""

MAX_LOGITS = 1 << 24
"""Elements of the logits that exist at a time."""


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if delta is not None:
        residual = residual + delta
    rstd = torch.rsqrt(residual.float().pow(2).mean(-1) + epsilon)
    # A weight in float32 makes the whole product one in float32.
    unit = (residual.float() * rstd[:, None]).to(weight.dtype)
    return residual, (weight * unit).to(residual.dtype), rstd


def add_norm_backward(
    dresidual: torch.Tensor | None,
    dnormed: torch.Tensor,
    residual: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    unit = residual.float() * rstd[:, None]
    dunit = (dnormed * weight).float()
    through_norm = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * rstd[:, None]
    through_norm = through_norm.to(dnormed.dtype)
    return through_norm if dresidual is None else dresidual + through_norm


def glu(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "clamped_silu":
        gate, up = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def glu_backward(dy: torch.Tensor, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "clamped_silu":
        return _clamped_silu_backward(dy, gate_up)
    gate, up = (half.float() for half in gate_up.chunk(2, -1))
    dy = dy.float()
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        activated, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:
        # gelu(g) = g / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (g + 0.044715 g^3)
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
        activated = gate / 2 * (1 + tanh)
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)
        slope = (1 + tanh) / 2 + gate / 2 * (1 - tanh**2) * inner
    return torch.cat((dy * up * slope, dy * activated), -1).to(gate_up.dtype)


def _clamped_silu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    dy, gate, up = dy.float(), gate_up[:, ::2].float(), gate_up[:, 1::2].float()
    is_inside, gate = gate <= 7.0, gate.clamp(max=7.0)
    sigmoid = torch.sigmoid(1.702 * gate)
    dgate = dy * (up.clamp(-7.0, 7.0) + 1) * sigmoid * (1 + 1.702 * gate * (1 - sigmoid)) * is_inside
    dup = dy * gate * sigmoid * (up.abs() <= 7.0)
    return torch.stack((dgate, dup), -1).flatten(1).to(gate_up.dtype)


def qk_norm(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, epsilon: float, config: AttentionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, rstds = qkv.clone(), []
    for part, weight in _queries_and_keys(normed, q_weight, k_weight, config):
        _, part_normed, rstd = add_norm(part.flatten(0, 1), None, weight, epsilon)
        part.copy_(part_normed.view_as(part))
        rstds.append(rstd.view(len(qkv), -1))
    return normed, torch.cat(rstds, 1)


def qk_norm_backward_(
    dqkv: torch.Tensor,
    qkv: torch.Tensor,
    rstd: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    config: AttentionConfig,
) -> None:
    gradients = _queries_and_keys(dqkv, q_weight, k_weight, config)
    inputs = _queries_and_keys(qkv, q_weight, k_weight, config)
    rstds = rstd.split([part.shape[1] for part, _ in inputs], 1)
    for (gradient, weight), (part, _), part_rstd in zip(gradients, inputs, rstds, strict=True):
        before = add_norm_backward(None, gradient.flatten(0, 1), part.flatten(0, 1), part_rstd.flatten(), weight)
        gradient.copy_(before.view_as(gradient))


def _queries_and_keys(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, config: AttentionConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """View queries and keys as (T, norms, features of a norm), each with the weight of its norm."""
    widths = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    queries, keys = qkv[:, : sum(widths)].split(widths, 1)
    return [(part.unflatten(1, (-1, len(w))), w) for part, w in ((queries, q_weight), (keys, k_weight))]


def attention(
    qkv: torch.Tensor, batch: FlatBatch, config: AttentionConfig, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Implement `Ops.attention`.

    The saved tensors are rotated queries, keys and values, the leaves of a small autograd graph, and its output.
    """
    q, k, v = qkv.unflatten(1, (-1, config.head_dim)).split(
        (config.num_heads, config.num_kv_heads, config.num_kv_heads), 1
    )
    cos, sin = config.cos[batch.positions][:, None], config.sin[batch.positions][:, None]
    q, k = (rotate(heads, cos, sin) for heads in (q, k))
    indices, is_real = batch.padded
    # Sequences are padded on the right, so that no mask of the padding is needed.
    leaves = tuple(heads[indices].transpose(1, 2).detach().requires_grad_() for heads in (q, k, v))
    with torch.enable_grad():
        output = _attend(leaves[0], leaves[1], leaves[2], config, sinks)
    return output.detach().transpose(1, 2)[is_real].flatten(1), (*leaves, output)


def attention_backward(
    do: torch.Tensor, saved: tuple[torch.Tensor, ...], batch: FlatBatch, config: AttentionConfig
) -> torch.Tensor:
    *leaves, output = saved
    _, is_real = batch.padded
    padded_do = do.new_zeros(*is_real.shape, config.num_heads, config.head_dim)
    padded_do[is_real] = do.unflatten(1, (config.num_heads, config.head_dim))
    gradients = torch.autograd.grad(output, leaves, padded_do.transpose(1, 2))
    dq, dk, dv = (gradient.transpose(1, 2)[is_real] for gradient in gradients)
    cos, sin = config.cos[batch.positions][:, None], config.sin[batch.positions][:, None]
    dq, dk = (_rotate_back(heads, cos, sin) for heads in (dq, dk))
    return torch.cat((dq, dk, dv), 1).flatten(1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: AttentionConfig, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attend causally: q (sequences, num_heads, length, D) and k, v (sequences, num_kv_heads, length, D)."""
    length, gqa = q.shape[2], config.num_heads != config.num_kv_heads
    if config.softcap is None and sinks is None and (config.window is None or config.window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, scale=config.scale)
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < (config.window or length))
    return attend_to(q, k, v, visible, config, None if sinks is None else sinks[:, None, None])


def attend_to(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    config: AttentionConfig,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend to the visible keys: q (sequences, heads, queries, D), k and v (sequences, key heads, keys, D) -> as q.

    Args:
        q: queries; consecutive heads share a key head.
        k: keys.
        v: values.
        visible: bool that broadcasts to (sequences, heads, queries, keys).
        config: scale and cap.
        sinks: as in `Ops.attention`, in a shape that broadcasts to (sequences, heads, queries, 1).
    """
    gqa = q.shape[1] != k.shape[1]
    if config.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=gqa, scale=config.scale)
    if gqa:
        k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    scores = q @ k.mT * config.scale
    if config.softcap is not None:
        scores = config.softcap * torch.tanh(scores / config.softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), -1).softmax(-1, wide)[..., :-1].to(v.dtype) @ v
    return scores.softmax(-1, wide).to(v.dtype) @ v


def lora_down(x: torch.Tensor, adapters: Adapters, group: LayerGroup, batch: FlatBatch) -> torch.Tensor:
    a, rank = adapters.a(group, adapters.weights), adapters.rank
    x, columns = x.to(adapters.compute_dtype), []
    for index, layer in enumerate(group.layers):
        layer_a = a[:, rank * index : rank * (index + 1)]
        columns.append(_matmul_by_slot(_drop(x, layer.module_id, batch), layer_a.mT, batch))
    lora_hidden = torch.cat(columns, 1)
    if not batch.has_dropout:
        return lora_hidden
    return lora_hidden * _per_token(batch.table["keep_scale"], batch)[:, None].to(lora_hidden.dtype)


def lora_up_(
    y: torch.Tensor, lora_hidden: torch.Tensor, adapters: Adapters, group: LayerGroup, batch: FlatBatch
) -> None:
    b, rank, b_row = adapters.b(group, adapters.weights), adapters.rank, 0
    for index, layer in enumerate(group.layers):
        layer_b = b[:, b_row : b_row + layer.out_features]
        up = _matmul_by_slot(lora_hidden[:, rank * index : rank * (index + 1)], layer_b.mT, batch)
        scale = _layer_scale(adapters, group.first_layer + index, batch)
        y[:, layer.column : layer.column + layer.out_features] += up * scale[:, None]
        b_row += layer.out_features


def lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    lora_hidden: torch.Tensor,
    dx: torch.Tensor,
    adapters: Adapters,
    group: LayerGroup,
    batch: FlatBatch,
) -> None:
    a, b = adapters.a(group, adapters.weights), adapters.b(group, adapters.weights)
    da, db = adapters.a(group, adapters.gradients), adapters.b(group, adapters.gradients)
    dtype, rank, b_row = lora_hidden.dtype, adapters.rank, 0
    x, keep_scale = x.to(dtype), _per_token(batch.table["keep_scale"], batch)[:, None].to(dtype)
    for index, layer in enumerate(group.layers):
        scale = _layer_scale(adapters, group.first_layer + index, batch)
        dup = (dy[:, layer.column : layer.column + layer.out_features] * scale[:, None]).to(dtype)
        ranks, b_rows = slice(rank * index, rank * (index + 1)), slice(b_row, b_row + layer.out_features)
        dlora_hidden = _matmul_by_slot(dup, b[:, b_rows], batch)
        _accumulate_by_slot_(db[:, b_rows], dup, lora_hidden[:, ranks], batch)
        if batch.has_dropout:
            dlora_hidden = dlora_hidden * keep_scale
        _accumulate_by_slot_(da[:, ranks], dlora_hidden, _drop(x, layer.module_id, batch), batch)
        dx += _drop(_matmul_by_slot(dlora_hidden, a[:, ranks], batch), layer.module_id, batch)
        b_row += layer.out_features


def cross_entropy(
    hidden: torch.Tensor, lm_head: LmHead, batch: FlatBatch, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weight, tokens = lm_head.weight, batch.target_tokens[batch.target_tokens < batch.num_tokens].long()
    loss_weight = _per_token(batch.table["loss_weight"], batch)
    losses, hits = (torch.zeros(batch.num_tokens, device=hidden.device) for _ in range(2))
    dhidden = torch.zeros_like(hidden) if with_gradient else None
    for part in tokens.split(max(1, MAX_LOGITS // len(weight))):
        logits, index = F.linear(hidden[part], weight).float() / lm_head.divisor, batch.targets[part].long()[:, None]
        slope = 1 / lm_head.divisor
        if lm_head.softcap is not None:
            tanh = torch.tanh(logits / lm_head.softcap)
            logits, slope = lm_head.softcap * tanh, slope * (1 - tanh**2)
        log_p = F.log_softmax(logits, -1)
        losses[part] = -log_p.gather(1, index)[:, 0].float()
        hits[part] = (logits.argmax(-1) == index[:, 0]).float()
        if dhidden is not None:
            dlogits = log_p.exp_()
            dlogits.scatter_add_(1, index, -torch.ones_like(index, dtype=log_p.dtype))
            dhidden[part] = (dlogits * slope * loss_weight[part][:, None]).to(weight.dtype) @ weight
    return losses, hits, dhidden


def sum_by_slot(values: torch.Tensor, batch: FlatBatch, num_slots: int) -> torch.Tensor:
    is_of_slot = batch.tile_slots[None] == torch.arange(num_slots, device=values.device)[:, None]
    # `where`, because a product with 0 would spread a NaN of one slot to all.
    return torch.where(is_of_slot, values.view(len(batch.tile_slots), -1).sum(1), 0).sum(1)


def update(adapters: Adapters, batch: FlatBatch) -> torch.Tensor:
    norms = torch.linalg.vector_norm(adapters.gradients, dim=1, dtype=torch.float64).float()
    for slot in torch.nonzero(batch.table["applies"])[:, 0].tolist():
        table = {name: values[slot] for name, values in batch.table.items()}
        gradient = adapters.gradients[slot]
        if norms[slot].isfinite():
            gradient *= (table["max_norm"] / (norms[slot] + 1e-6)).clamp(max=1.0)
            if adapters.eight_bit is None:
                _adamw(adapters.weights[slot], adapters.moment1[slot], adapters.moment2[slot], gradient, table)
            else:
                _adamw_eight_bit(adapters, slot, table)
        gradient.zero_()
    return norms


def _adamw_eight_bit(adapters: Adapters, slot: int, table: Mapping[str, torch.Tensor]) -> None:
    """Make a slot's step matrix by matrix, with moments that are dequantized before and quantized after."""
    rank = int(table["rank"])
    weights, gradients = (dict(adapters.matrices(slot, rank, flat)) for flat in (adapters.weights, adapters.gradients))
    for name, stored in adapters.eight_bit_moments(slot, rank):
        moment1, moment2 = (moment.read().view_as(weights[name]) for moment in stored)
        _adamw(weights[name], moment1, moment2, gradients[name], table)
        stored[0].write(moment1.flatten())
        stored[1].write(moment2.flatten())


def _adamw(weights: Any, moment1: Any, moment2: Any, gradient: Any, table: Mapping[str, torch.Tensor]) -> None:
    """Make one AdamW step on these tensors, in place."""
    moment1.lerp_(gradient.to(moment1.dtype), table["one_minus_beta1"])
    moment2.lerp_(gradient.square().to(moment2.dtype), table["one_minus_beta2"])
    weights.mul_(1 - table["learning_rate"] * table["weight_decay"])
    denominator = (moment2 / table["bias_correction2"]).sqrt_().add_(table["epsilon"])
    weights.sub_(table["learning_rate"] / table["bias_correction1"] * moment1 / denominator)


def dropout_mask(batch: FlatBatch, module_id: int, features: int) -> torch.Tensor:
    """Compute a dropout mask from the slot's key (its seed and step), the module, the token and the feature alone.

    Each token gets a 32-bit word by an integer hash (lowbias32, github.com/skeeto/hash-prospector). The key enters that
    hash twice, so that the mask of one module is not the mask of another with its rows in another order. The word is
    combined with a word of each feature, and goes through the two products of the same hash once more.

    Returns:
        (T, features) bool, True where the feature is kept.
    """
    if (known := batch.dropout_masks.get((module_id, features))) is not None:  # the backward needs it again
        return known
    key, threshold = (
        _per_token(batch.table[name], batch).cpu().numpy().view(np.uint32) for name in ("key", "threshold")
    )
    key = _lowbias32(key ^ np.uint32(module_id * 0x9E3779B9 & 0xFFFFFFFF))
    words = _lowbias32(batch.dropout_positions.cpu().numpy().view(np.uint32) ^ key, key * np.uint32(0x85EBCA6B))
    # NumPy has unsigned integers and computes in place: several times faster than PyTorch here.
    bits = words[:, None] ^ np.arange(features, dtype=np.uint32) * np.uint32(0x9E3779B9)
    bits *= np.uint32(0x7FEB352D)
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    mask = torch.from_numpy(bits >= threshold[:, None] * np.uint32(2)).to(batch.ids.device)
    batch.dropout_masks[module_id, features] = mask
    return mask


def _drop(x: torch.Tensor, module_id: int, batch: FlatBatch) -> torch.Tensor:
    """Set dropped features to zero; the kept ones are not scaled yet."""
    return torch.where(dropout_mask(batch, module_id, x.shape[1]), x, 0) if batch.has_dropout else x


def _layer_scale(adapters: Adapters, layer: int, batch: FlatBatch) -> torch.Tensor:
    """Return the scale of each token in the adapted layer of this number, (T,)."""
    return _per_token(batch.table["scale"] * adapters.factors[layer], batch)


def _per_token(values: torch.Tensor, batch: FlatBatch) -> torch.Tensor:
    """Expand a value of each slot, (S,), to its tokens, (T,)."""
    return values[batch.slot_ids]


def _matmul_by_slot(x: torch.Tensor, weights: torch.Tensor, batch: FlatBatch) -> torch.Tensor:
    """Multiply each token by its slot's matrix: (T, in), (S, in, out) -> (T, out)."""
    if len(weights) == 1:
        return x @ weights[0].to(x.dtype)
    result = x.new_empty(len(x), weights.shape[2])
    for slot, tokens in batch.tokens_by_slot:
        result[tokens] = x[tokens] @ weights[slot].to(x.dtype)
    return result


def _accumulate_by_slot_(sums: torch.Tensor, x: torch.Tensor, y: torch.Tensor, batch: FlatBatch) -> None:
    """Add x^T y over each slot's tokens to `sums`, in place: (T, m), (T, n) -> (S, m, n) float32."""
    if len(sums) == 1:
        sums[0] += (x.mT @ y).float()
        return
    for slot, tokens in batch.tokens_by_slot:
        sums[slot] += (x[tokens].mT @ y[tokens]).float()


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first features of each head, as many as `cos` has."""
    rotated, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    # Some families have tables in float32.
    return torch.cat(((rotated * cos + _rotate_half(rotated) * sin).to(heads.dtype), rest), -1)


def _rotate_back(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of the input of `rotate` from that of its result."""
    rotated, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    return torch.cat(((rotated * cos - _rotate_half(rotated * sin)).to(heads.dtype), rest), -1)


def _rotate_half(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _lowbias32(x: Any, tweak: Any = 0) -> Any:
    """Hash uint32 to uint32 in two rounds; `tweak`, uint32 too, is mixed in after the first."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D) ^ tweak
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
