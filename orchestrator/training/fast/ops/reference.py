"""The parts of a fast step in plain PyTorch: what a CPU runs, and what `kernels` is held against.

Shapes: T tokens, H hidden, D head size. Autograd is used for attention alone: each part has its backward beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import IGNORED, FlatBatch

TILE = 8
"""Tokens that surely belong to one slot."""

MAX_LOGITS = 1 << 24
"""Elements of the logits that exist at a time."""


def add_norm(
    states: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual sum, its RMS norm (arXiv 1910.07467), and the reciprocal root: (T, H), (T, H), (T,) float32."""
    if delta is not None:
        states = states + delta
    root = torch.rsqrt(states.float().pow(2).mean(-1) + epsilon)
    return states, weight * (states.float() * root[:, None]).to(states.dtype), root


def add_norm_backward(
    gradient: torch.Tensor,
    normed_gradient: torch.Tensor,
    states: torch.Tensor,
    root: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the residual sum (so of both its terms): what came by the residual, plus through the norm. (T, H)."""
    unit = states.float() * root[:, None]
    scaled = (normed_gradient * weight).float()
    through = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * root[:, None]
    return gradient + through.to(gradient.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: (T, 2 I) -> (T, I)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """(T, I) -> (T, 2 I)."""
    gate, up = (half.float() for half in gate_up.chunk(2, -1))
    sigmoid = torch.sigmoid(gate)
    gradient = gradient.float()
    by_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((by_gate, gradient * gate * sigmoid), -1).to(gate_up.dtype)


@dataclass(frozen=True)
class Heads:
    """Attention's shape, and its tables of angles."""

    queries: int
    keys: int
    size: int
    cos: torch.Tensor
    """(positions, D)."""
    sin: torch.Tensor


@dataclass(frozen=True)
class Attended:
    """What attention's backward needs."""

    inputs: tuple[torch.Tensor, ...]
    """Rotated queries, keys and values; leaves of a small autograd graph."""
    output: torch.Tensor


def attention(qkv: torch.Tensor, row: FlatBatch, heads: Heads) -> tuple[torch.Tensor, Attended]:
    """Rotary positions (arXiv 2104.09864), then causal attention within each sequence.

    Args:
        qkv: (T, (queries + 2 keys) * D).

    Returns:
        (T, queries * D), and what the backward needs.
    """
    query, key, value = qkv.unflatten(1, (-1, heads.size)).split((heads.queries, heads.keys, heads.keys), 1)
    cos, sin = heads.cos[row.positions][:, None], heads.sin[row.positions][:, None]
    query, key = (states * cos + _turned(states) * sin for states in (query, key))
    places, real = row.padded
    # Filled on the right, no mask is needed but the causal one.
    inputs = tuple(states[places].transpose(1, 2).detach().requires_grad_() for states in (query, key, value))
    with torch.enable_grad():
        query, key, value = inputs
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads.queries != heads.keys
        )
    return output.detach().transpose(1, 2)[real].flatten(1), Attended(inputs, output)


def attention_backward(gradient: torch.Tensor, attended: Attended, row: FlatBatch, heads: Heads) -> torch.Tensor:
    """(T, queries * D) -> (T, (queries + 2 keys) * D)."""
    _, real = row.padded
    by_output = gradient.new_zeros(*real.shape, heads.queries, heads.size)
    by_output[real] = gradient.unflatten(1, (heads.queries, heads.size))
    gradients = torch.autograd.grad(attended.output, attended.inputs, by_output.transpose(1, 2))
    query, key, value = (gradient.transpose(1, 2)[real] for gradient in gradients)
    cos, sin = heads.cos[row.positions][:, None], heads.sin[row.positions][:, None]
    query, key = (states * cos - _turned(states * sin) for states in (query, key))
    return torch.cat((query, key, value), 1).flatten(1)


def lora_down(x: torch.Tensor, adapters: Adapters, group: LayerGroup, row: FlatBatch) -> torch.Tensor:
    """dropout(x) A^T for each layer of the group, each with masks of its own: (T, in) -> (T, layers * rank)."""
    a, rank = adapters.a(group, adapters.weights), adapters.rank
    x, lows = x.to(adapters.compute), []
    for index, layer in enumerate(group.layers):
        lows.append(_by_slot(_dropped(x, layer.number, row), a[:, rank * index : rank * (index + 1)].mT, row))
    low = torch.cat(lows, 1)
    return low * _of_token(row.table["keep_scale"], row)[:, None].to(low.dtype) if row.drops else low


def lora_up_(y: torch.Tensor, low: torch.Tensor, adapters: Adapters, group: LayerGroup, row: FlatBatch) -> None:
    """y += scale * low B^T, in place, at the columns of the group's layers: (T, out)."""
    b, rank, at = adapters.b(group, adapters.weights), adapters.rank, 0
    scale = _of_token(row.table["scale"], row)
    for index, layer in enumerate(group.layers):
        up = _by_slot(low[:, rank * index : rank * (index + 1)], b[:, at : at + layer.width].mT, row)
        y[:, layer.column : layer.column + layer.width] += up * scale[:, None]
        at += layer.width


def lora_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    x_gradient: torch.Tensor,
    adapters: Adapters,
    group: LayerGroup,
    row: FlatBatch,
) -> None:
    """Add to the gradients of A and B, and to that of x, in place.

    Args:
        gradient: (T, out) of the layers' output.
        x: (T, in) their input.
        low: (T, layers * rank) from `lora_down`.
        x_gradient: (T, in) what has come through the base.
    """
    a, b = adapters.a(group, adapters.weights), adapters.b(group, adapters.weights)
    a_gradient, b_gradient = adapters.a(group, adapters.gradients), adapters.b(group, adapters.gradients)
    scale, rank, at = _of_token(row.table["scale"], row), adapters.rank, 0
    x, keep_scale = x.to(low.dtype), _of_token(row.table["keep_scale"], row)[:, None].to(low.dtype)
    for index, layer in enumerate(group.layers):
        by_up = (gradient[:, layer.column : layer.column + layer.width] * scale[:, None]).to(low.dtype)
        ranks, rows = slice(rank * index, rank * (index + 1)), slice(at, at + layer.width)
        by_low = _by_slot(by_up, b[:, rows], row)
        _add_by_slot_(b_gradient[:, rows], by_up, low[:, ranks], row)
        if row.drops:
            by_low = by_low * keep_scale
        _add_by_slot_(a_gradient[:, ranks], by_low, _dropped(x, layer.number, row), row)
        x_gradient += _dropped(_by_slot(by_low, a[:, ranks], row), layer.number, row)
        at += layer.width


def cross_entropy(
    states: torch.Tensor, head: torch.Tensor, row: FlatBatch, trains: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss and gradient of the LM head in one pass, a few tokens' logits at a time.

    Args:
        states: (T, H) after the last norm.
        head: (vocabulary, H).
        trains: whether the gradient is wanted.

    Returns:
        (T,) float32 losses and (T,) float32 whether the target was likeliest, both 0 where there is no target; and the
        gradient of the weighted losses' sum for the states, (T, H).
    """
    weight = _of_token(row.table["loss_weight"], row)
    losses, hits, gradients = [], [], []
    for part, targets, weights in zip(
        *(tensor.split(max(1, MAX_LOGITS // len(head))) for tensor in (states, row.targets, weight)), strict=True
    ):
        logits = F.linear(part, head).float()
        wanted, counts = targets.clamp(min=0).long()[:, None], targets != IGNORED
        logs = F.log_softmax(logits, -1)
        losses.append(-logs.gather(1, wanted)[:, 0] * counts)
        hits.append((logits.argmax(-1) == targets).float())
        if trains:
            by_logits = logs.exp_()
            by_logits.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=logs.dtype))
            gradients.append((by_logits * (weights * counts)[:, None]).to(head.dtype) @ head)
    return torch.cat(losses), torch.cat(hits), torch.cat(gradients) if trains else None


def sum_by_slot(values: torch.Tensor, row: FlatBatch, num_slots: int) -> torch.Tensor:
    """(T,) float32 -> (slots,). The same order of sums each time."""
    member = row.tiles[None] == torch.arange(num_slots, device=values.device)[:, None]
    return torch.where(member, values.view(len(row.tiles), -1).sum(1), 0).sum(1)  # a product would spread a NaN


def update(adapters: Adapters, row: FlatBatch) -> torch.Tensor:
    """Clip, make the AdamW step (arXiv 1711.05101) and clear the gradient of each slot whose batch is complete.

    A slot whose gradient is not finite does not step; its norm tells.

    Returns:
        (slots,) float32 norms of the gradients before clipping.
    """
    norms = torch.linalg.vector_norm(adapters.gradients, dim=1, dtype=torch.float64).float()
    for slot in torch.nonzero(row.table["applies"])[:, 0].tolist():
        table = {name: values[slot] for name, values in row.table.items()}
        gradient = adapters.gradients[slot]
        if norms[slot].isfinite():
            gradient *= (table["max_norm"] / (norms[slot] + 1e-6)).clamp(max=1.0)
            if adapters.eight is None:
                _adamw(adapters.weights[slot], adapters.moment1[slot], adapters.moment2[slot], gradient, table)
            else:
                rank = int(table["rank"])
                weights, gradients = (
                    dict(adapters.matrices(slot, rank, flat)) for flat in (adapters.weights, adapters.gradients)
                )
                for name, kept in adapters.in_eight_bits(slot, rank):
                    moment1, moment2 = (moment.read().view_as(weights[name]) for moment in kept)
                    _adamw(weights[name], moment1, moment2, gradients[name], table)
                    kept[0].write(moment1.flatten())
                    kept[1].write(moment2.flatten())
        gradient.zero_()
    return norms


def _adamw(weights: Any, moment1: Any, moment2: Any, gradient: Any, table: Mapping[str, torch.Tensor]) -> None:
    """A slot's step on these tensors, in place."""
    moment1.lerp_(gradient.to(moment1.dtype), table["gain1"])
    moment2.lerp_(gradient.square().to(moment2.dtype), table["gain2"])
    weights.mul_(1 - table["learning_rate"] * table["decay"])
    denominator = (moment2 / table["correction2"]).sqrt_().add_(table["epsilon"])
    weights.sub_(table["learning_rate"] / table["correction1"] * moment1 / denominator)


def dropout_mask(row: FlatBatch, module: int, features: int) -> torch.Tensor:
    """Dropout's mask: a function of the slot's key (its seed and step), the module, the token and the feature alone.

    Each token has a word, from a 32-bit integer hash (lowbias32, github.com/skeeto/hash-prospector) into which the key
    goes twice, so that the masks of two modules are not one another's rows in another order. With each feature's own
    word it goes through that hash's two products once more.

    Returns:
        (T, features) bool.
    """
    if (known := row.masks.get((module, features))) is not None:  # the backward wants it again
        return known
    key, threshold = (_of_token(row.table[name], row).cpu().numpy().view(np.uint32) for name in ("key", "threshold"))
    key = _mixed(key ^ np.uint32(module * 0x9E3779B9 & 0xFFFFFFFF))
    words = _mixed(row.counters.cpu().numpy().view(np.uint32) ^ key, key * np.uint32(0x85EBCA6B))
    # In NumPy, whose integers are unsigned and whose steps are made in place: several times sooner than in PyTorch.
    bits = words[:, None] ^ np.arange(features, dtype=np.uint32) * np.uint32(0x9E3779B9)
    bits *= np.uint32(0x7FEB352D)
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    mask = torch.from_numpy(bits >= threshold[:, None] * np.uint32(2)).to(row.ids.device)
    row.masks[module, features] = mask
    return mask


def _dropped(x: torch.Tensor, module: int, row: FlatBatch) -> torch.Tensor:
    """x without what dropout drops, not scaled yet."""
    return torch.where(dropout_mask(row, module, x.shape[1]), x, 0) if row.drops else x


def _of_token(values: torch.Tensor, row: FlatBatch) -> torch.Tensor:
    """(slots,) -> (T,)."""
    return values[row.owners]


def _by_slot(x: torch.Tensor, weights: torch.Tensor, row: FlatBatch) -> torch.Tensor:
    """Each token times its slot's matrix: (T, in), (slots, in, out) -> (T, out)."""
    if len(weights) == 1:
        return x @ weights[0].to(x.dtype)
    result = x.new_empty(len(x), weights.shape[2])
    for slot, tokens in row.tokens_of_slots:
        result[tokens] = x[tokens] @ weights[slot].to(x.dtype)
    return result


def _add_by_slot_(sums: torch.Tensor, x: torch.Tensor, y: torch.Tensor, row: FlatBatch) -> None:
    """sums += x^T y over each slot's tokens: (T, m), (T, n) -> (slots, m, n) float32, in place."""
    if len(sums) == 1:
        sums[0] += (x.mT @ y).float()
        return
    for slot, tokens in row.tokens_of_slots:
        sums[slot] += (x[tokens].mT @ y[tokens]).float()


def _turned(states: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _mixed(x: Any, between: Any = 0) -> Any:
    """uint32 -> uint32; `between`, uint32 too, comes in after the first of its two rounds."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D) ^ between
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
