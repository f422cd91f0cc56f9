"""A small version of the fast engine: it trains many LoRA adapters on one frozen base in one pass.

Five ideas, in the order of this file. The rows follow one another in a *flat batch*, not padded to each other's length.
Every trial has a *slot* in stacked LoRA matrices. *Dropout masks* come from a hash, so they do not depend on other
trials. The *backward pass is written by hand*, because only A and B train. Each slot has its own optimizer step.
`orchestrator/training/fast` does the same for real models. Run this file to see three trials train together.

Shapes: T tokens of a flat batch, S slots, H hidden size, V vocabulary, R stack rank (the largest rank of the slots,
rounded up to a power of two; here simply the largest).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu, softmax

TILE = 4
"""Tokens. All tokens of a tile belong to one slot, so each program of a kernel works for one adapter."""


# 1. The flat batch: rows are not padded; only the end of a span (one slot's part of the batch) is filled.
@dataclass
class FlatBatch:
    tokens: Tensor  # (T,)
    targets: Tensor  # (T,): the next token, or -1 for tokens without a loss
    cu_seqlens: list[int]  # sequence i covers tokens cu_seqlens[i] to cu_seqlens[i + 1]
    slot_ids: Tensor  # (T,): the slot that each token belongs to
    positions: Tensor  # (T,): index of the token in its slot's span; dropout depends on it


def flat_batch(rows: dict[int, list[list[int]]]) -> FlatBatch:
    """Join the rows of each slot, one after another. A filler sequence completes the last tile of a slot."""
    tokens, targets, cu_seqlens, slot_ids, positions = [], [], [0], [], []
    for slot, of_slot in rows.items():
        start, filler = len(tokens), [0] * (-sum(map(len, of_slot)) % TILE)
        for row in [*of_slot, filler]:
            tokens += row
            targets += [-1] * len(row) if row is filler else [*row[1:], -1]
            cu_seqlens.append(len(tokens))
        slot_ids += [slot] * (len(tokens) - start)
        positions += range(len(tokens) - start)
    return FlatBatch(*map(torch.tensor, (tokens, targets)), cu_seqlens, *map(torch.tensor, (slot_ids, positions)))


# 2. Slots: the adapters of all trials, stacked. Smaller ranks are filled with zeros, which training does not change.
class Slots:
    def __init__(self, base: "Base", ranks: list[int], rates: list[float], dropouts: list[float], alpha: float = 16):
        self.a: dict[str, Tensor] = {}  # (S, R, in)
        self.b: dict[str, Tensor] = {}  # (S, out, R), zero at the start: a new adapter changes nothing
        for name, weight in base.linears.items():
            self.a[name] = weight.new_zeros(len(ranks), max(ranks), weight.shape[1])
            self.b[name] = weight.new_zeros(len(ranks), weight.shape[0], max(ranks))
            for slot, rank in enumerate(ranks):
                drawn = torch.randn(rank, weight.shape[1], generator=torch.Generator().manual_seed(slot))
                self.a[name][slot, :rank] = drawn / weight.shape[1] ** 0.5
        self.scale = torch.tensor([alpha / rank for rank in ranks])  # values that differ between trials: (S,) each
        self.rate, self.dropout, self.seed = torch.tensor(rates), torch.tensor(dropouts), torch.arange(len(ranks))
        self.step = torch.zeros(len(ranks), dtype=torch.long)
        self.moments = {key: torch.zeros(2, *value.shape, dtype=value.dtype) for key, value in self.parameters()}

    def parameters(self) -> list[tuple[tuple[str, str], Tensor]]:
        return [((kind, name), value) for kind in "ab" for name, value in getattr(self, kind).items()]


# 3. Dropout by a hash of (seed, step, module, token, feature): independent of other trials, and never stored.
def mixed(value: Tensor) -> Tensor:
    """Mix the lowest 32 bits, with constants from github.com/skeeto/hash-prospector."""
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return value ^ (value >> 15)


def dropout_mask(batch: FlatBatch, slots: Slots, module: int, features: int) -> Tensor:
    """Return (T, features): zero where dropout drops, else 1 / (1 - p) of the token's slot."""
    key = mixed(mixed(slots.seed * 65536 + slots.step) + module)[batch.slot_ids]
    word = mixed(mixed(key + batch.positions)[:, None] + torch.arange(features))
    p = slots.dropout[batch.slot_ids][:, None]
    return (word / 2**32 >= p) / (1 - p)


# 4. The model, forward and backward. The base is frozen, so the backward pass needs one product per linear layer.
class Base:
    """Two decoder layers with one attention head: `h += o(attention(qkv(h)))`, then `h += down(silu(up(h)))`."""

    def __init__(self, vocabulary: int = 32, hidden: int = 8):
        generator = torch.Generator().manual_seed(0)
        sizes = {"qkv": (3 * hidden, hidden), "o": (hidden, hidden), "up": (16, hidden), "down": (hidden, 16)}
        names = [(f"{layer}.{module}", size) for layer in range(2) for module, size in sizes.items()]
        self.linears = {name: torch.randn(*size, generator=generator).double() / 4 for name, size in names}
        self.embedding = torch.randn(vocabulary, hidden, generator=generator).double()  # (V, H), also the head


class Pass:
    """One pass of all slots over a flat batch."""

    def __init__(self, base: Base, slots: Slots, batch: FlatBatch):
        self.base, self.slots, self.batch = base, slots, batch
        self.gradients = {key: torch.zeros_like(value) for key, value in slots.parameters()}
        self.saved: dict[str, tuple[Tensor, ...]] = {}  # tensors of the forward pass for the backward pass
        self.counts = torch.bincount(batch.slot_ids[batch.targets >= 0], minlength=len(slots.rate))

    def forward(self) -> Tensor:
        """Return each slot's mean loss over its own targets: (S,), zero for a slot without a batch."""
        h = self.base.embedding[self.batch.tokens]
        for layer in range(2):
            h = h + self.linear(f"{layer}.o", self.attention(layer, self.linear(f"{layer}.qkv", h)))
            self.saved[f"{layer}.silu"] = (up := self.linear(f"{layer}.up", h),)
            h = h + self.linear(f"{layer}.down", silu(up))
        self.saved["logits"] = (logits := h @ self.base.embedding.T,)
        log_p = logits.log_softmax(-1).gather(1, self.batch.targets.clamp(min=0)[:, None])[:, 0]
        losses = torch.where(self.batch.targets >= 0, -log_p, 0)
        sums = h.new_zeros(len(self.counts)).index_add(0, self.batch.slot_ids, losses)
        return sums / self.counts.clamp(min=1)

    def backward(self) -> None:
        """Compute `gradients` of each slot's loss. No slot's loss depends on the A and B of another slot."""
        (logits,) = self.saved["logits"]
        d_logits = softmax(logits, -1)
        learned = self.batch.targets >= 0
        d_logits[learned, self.batch.targets[learned]] -= 1
        d_logits *= (learned.double() / self.counts.clamp(min=1)[self.batch.slot_ids])[:, None]
        dh = d_logits @ self.base.embedding
        for layer in reversed(range(2)):
            (up,) = self.saved[f"{layer}.silu"]
            sigmoid = torch.sigmoid(up)
            d_up = self.linear_backward(f"{layer}.down", dh) * sigmoid * (1 + up * (1 - sigmoid))
            dh = dh + self.linear_backward(f"{layer}.up", d_up)
            d_qkv = self.attention_backward(layer, self.linear_backward(f"{layer}.o", dh))
            dh = dh + self.linear_backward(f"{layer}.qkv", d_qkv)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return x W^T + scale * dropout(x) A^T B^T, with the A and B of each token's slot."""
        s, ids = self.slots, self.batch.slot_ids
        mask = dropout_mask(self.batch, s, list(self.base.linears).index(name), x.shape[1])
        lora_hidden = torch.einsum("ti,tri->tr", x * mask, s.a[name][ids])  # a kernel reads A once per tile
        self.saved[name] = (x, mask, lora_hidden)
        lora = torch.einsum("tr,tor->to", lora_hidden, s.b[name][ids])
        return x @ self.base.linears[name].T + s.scale[ids, None] * lora

    def linear_backward(self, name: str, dy: Tensor) -> Tensor:
        """Add to the gradients of A and B, and return dx. W is frozen, so its gradient is not computed."""
        (x, mask, lora_hidden), s, ids = self.saved[name], self.slots, self.batch.slot_ids
        scaled = s.scale[ids, None] * dy
        d_hidden = torch.einsum("to,tor->tr", scaled, s.b[name][ids])
        self.gradients["b", name].index_add_(0, ids, scaled[:, :, None] * lora_hidden[:, None, :])
        self.gradients["a", name].index_add_(0, ids, d_hidden[:, :, None] * (x * mask)[:, None, :])
        return dy @ self.base.linears[name] + mask * torch.einsum("tr,tri->ti", d_hidden, s.a[name][ids])

    def attention(self, layer: int, qkv: Tensor) -> Tensor:
        """Causal attention within each sequence (arXiv 1706.03762): (T, 3 H) -> (T, H)."""
        outputs, saved = [], [qkv]
        for start, end in zip(self.batch.cu_seqlens, self.batch.cu_seqlens[1:], strict=False):
            q, k, v = qkv[start:end].chunk(3, dim=1)
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            p = softmax((q @ k.T / q.shape[1] ** 0.5).masked_fill(hidden, -torch.inf), -1)
            outputs.append(p @ v)
            saved.append(p)
        self.saved[f"{layer}.attention"] = tuple(saved)
        return torch.cat(outputs)

    def attention_backward(self, layer: int, d_out: Tensor) -> Tensor:
        qkv, *shares = self.saved[f"{layer}.attention"]
        d_qkv = []
        for start, end, p in zip(self.batch.cu_seqlens, self.batch.cu_seqlens[1:], shares, strict=False):
            (q, k, v), do = qkv[start:end].chunk(3, dim=1), d_out[start:end]
            dp = do @ v.T
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[1] ** 0.5
            d_qkv.append(torch.cat([ds @ k, ds.T @ q, p.T @ do], dim=1))
        return torch.cat(d_qkv)


# 5. AdamW (arXiv 1711.05101, without weight decay) for each slot with a batch, with its own step and learning rate.
def update(slots: Slots, gradients: dict[tuple[str, str], Tensor], counts: Tensor) -> None:
    slots.step += counts > 0
    active, rate, step = (each.view(-1, 1, 1) for each in (counts > 0, slots.rate, slots.step.clamp(min=1)))
    for key, value in slots.parameters():
        m, v = slots.moments[key]
        m += 0.1 * active * (gradients[key] - m)
        v += 0.001 * active * (gradients[key].square() - v)
        value -= active * rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


def train_step(base: Base, slots: Slots, rows: dict[int, list[list[int]]]) -> Tensor:
    """Make one step for every slot that has rows. Return the losses before the step: (S,)."""
    step = Pass(base, slots, flat_batch(rows))
    losses = step.forward()
    step.backward()
    update(slots, step.gradients, step.counts)
    return losses


if __name__ == "__main__":
    base = Base()
    slots = Slots(base, ranks=[2, 4, 8], rates=[0.003, 0.01, 0.03], dropouts=[0.0, 0.1, 0.0])
    rows = [[start, *range(start + 1, start + 6)] for start in range(8)]
    for step in range(101):
        losses = train_step(base, slots, dict.fromkeys(range(3), rows))
        if step % 20 == 0:
            print(f"step {step:3}:", "  ".join(f"trial {slot}: {loss:.3f}" for slot, loss in enumerate(losses)))
