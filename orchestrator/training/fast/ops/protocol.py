"""The contract of the operations between the base's matrix products.

`reference` (PyTorch) and `triton.kernels` (Triton) are modules that satisfy `Ops`; mypy checks it in `ops_for`. Shapes,
dtypes and units are stated here once, and not again in the implementations.

Shapes: T tokens, H hidden size, I inner size of the MLP, D head size, V vocabulary, R stack rank, S slots. Tensors have
the compute dtype of the base unless another dtype is named. A gradient of `x` is called `dx`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from orchestrator.training.fast.families.family import Activation

if TYPE_CHECKING:
    from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
    from orchestrator.training.fast.step.flat_batch import FlatBatch


@dataclass(frozen=True)
class AttentionConfig:
    """How the layers of one kind attend: sizes of the heads, tables of the rotary embedding, scale, window and cap."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key heads, and as many value heads. Consecutive query heads share one."""
    head_dim: int
    cos: torch.Tensor
    """(positions, rotary size). The second half of each row repeats the first. The first features of each head are
    rotated, as many as the table has; the others are not."""
    sin: torch.Tensor
    """The same for sine."""
    scale: float
    """Factor of the products of queries and keys."""
    window: int | None = None
    """Number of the latest tokens that a token sees, itself included; None where it sees all of its sequence."""
    softcap: float | None = None
    """Limit c of the scaled products s, which become c * tanh(s / c) (Gemma 2, arXiv 2408.00118); None for no limit."""


@dataclass(frozen=True)
class LmHead:
    """The LM head, and what is done to its logits."""

    weight: torch.Tensor
    """(V, H)."""
    divisor: float = 1.0
    """Divides the logits."""
    softcap: float | None = None
    """Limit of the logits after the division, as `AttentionConfig.softcap`."""


class Ops(Protocol):
    """The operations that the decoder and the engine call between the matrix products of the base.

    A name that ends in an underscore marks an operation that writes its result into its first argument.
    """

    TILE: int
    """Tokens of a tile: so many consecutive tokens of a flat batch belong to one slot."""

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add to the residual stream and normalize the sum (RMSNorm, arXiv 1910.07467).

        Args:
            residual: (T, H).
            delta: (T, H) output of the previous block; None adds nothing.
            weight: (H,) of the norm. The normalized sum is rounded to the compute dtype before it is multiplied by a
                weight of that dtype, and after it is multiplied by one in float32.
            epsilon: added to the mean square.

        Returns:
            The sum (T, H), the normalized sum (T, H), and its reciprocal root mean square (T,) in float32.
        """
        ...

    def add_norm_backward(
        self,
        dresidual: torch.Tensor | None,
        dnormed: torch.Tensor,
        residual: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the gradient of the sum in `add_norm`, which is also the gradient of both its terms.

        Args:
            dresidual: (T, H) gradient that reaches the sum through the residual stream; None where none does.
            dnormed: (T, H) gradient of the normalized sum.
            residual: (T, H) the sum.
            rstd: (T,) float32 from `add_norm`.
            weight: (H,) of the norm.

        Returns:
            (T, H).
        """
        ...

    def glu(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Compute activation(gate) * up (arXiv 2002.05202): (T, 2 I) to (T, I).

        Gates come first, then ups; with "clamped_silu" they alternate (`families.family.Activation`).
        """
        ...

    def glu_backward(self, dy: torch.Tensor, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Compute the gradient of `gate_up` (T, 2 I) from that of the result (T, I)."""
        ...

    def qk_norm(
        self, qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, epsilon: float, config: AttentionConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalize queries and keys (RMSNorm), by head or over all heads of a token; values stay as they are.

        Args:
            qkv: (T, (num_heads + 2 num_kv_heads) * D), queries first.
            q_weight: of the queries' norm: (D,) normalizes each head, (num_heads * D,) all heads together.
            k_weight: of the keys' norm: (D,) or (num_kv_heads * D,). The dtypes of weights matter as in `add_norm`.
            epsilon: added to the mean square.
            config: sizes.

        Returns:
            A new tensor like `qkv`, and the reciprocal root mean squares (T, norms of queries + norms of keys) in
            float32, those of queries first.
        """
        ...

    def qk_norm_backward_(
        self,
        dqkv: torch.Tensor,
        qkv: torch.Tensor,
        rstd: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        config: AttentionConfig,
    ) -> None:
        """Replace the gradient of the result of `qk_norm` by that of its input, in place.

        Args:
            dqkv: (T, (num_heads + 2 num_kv_heads) * D) gradient.
            qkv: input of `qk_norm`.
            rstd: from `qk_norm`.
            q_weight: as in `qk_norm`.
            k_weight: as in `qk_norm`.
            config: as in `qk_norm`.
        """
        ...

    def attention(
        self, qkv: torch.Tensor, batch: FlatBatch, config: AttentionConfig, sinks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Rotate queries and keys (RoPE, arXiv 2104.09864), then attend causally within each sequence.

        Args:
            qkv: (T, (num_heads + 2 num_kv_heads) * D), queries first. It may be overwritten.
            batch: positions and sequence bounds.
            config: sizes and rotary tables.
            sinks: (num_heads,) logits that take part in each head's softmax without a value (arXiv 2309.17453); None
                for none.

        Returns:
            (T, num_heads * D), and the tensors that `attention_backward` of the same implementation needs.
        """
        ...

    def attention_backward(
        self, do: torch.Tensor, saved: tuple[torch.Tensor, ...], batch: FlatBatch, config: AttentionConfig
    ) -> torch.Tensor:
        """Compute the gradient of `qkv`, before rotation.

        Args:
            do: (T, num_heads * D) gradient of the output.
            saved: from `attention`.
            batch: as in `attention`.
            config: as in `attention`.

        Returns:
            (T, (num_heads + 2 num_kv_heads) * D).
        """
        ...

    def lora_down(self, x: torch.Tensor, adapters: Adapters, group: LayerGroup, batch: FlatBatch) -> torch.Tensor:
        """Compute dropout(x) A^T for each layer of a group; each layer has its own dropout mask.

        Args:
            x: (T, in) input that the layers share.
            adapters: their weights.
            group: the layers.
            batch: slots, dropout keys and dropout rates of the tokens.

        Returns:
            `lora_hidden` (T, layers * R) in `adapters.compute_dtype`. Columns beyond a slot's own rank are undefined.
        """
        ...

    def lora_up_(
        self, y: torch.Tensor, lora_hidden: torch.Tensor, adapters: Adapters, group: LayerGroup, batch: FlatBatch
    ) -> None:
        """Add scale * lora_hidden B^T to y, in place, at the columns of the group's layers.

        Args:
            y: (T, out) output of the base's layers, those without an adapter included.
            lora_hidden: (T, layers * R) from `lora_down`.
            adapters: weights of the layers.
            group: the layers.
            batch: slots of the tokens, and scales. A layer's own scale is that times `Adapters.factors`.
        """
        ...

    def lora_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        lora_hidden: torch.Tensor,
        dx: torch.Tensor,
        adapters: Adapters,
        group: LayerGroup,
        batch: FlatBatch,
    ) -> None:
        """Add to the gradients of A and B in `adapters.gradients`, and to `dx`, in place.

        Args:
            dy: (T, out) gradient of the layers' output.
            x: (T, in) input of the layers.
            lora_hidden: (T, layers * R) from `lora_down`.
            dx: (T, in) gradient that has come through the base; the adapters' part is added.
            adapters: weights and gradients of the layers.
            group: the layers.
            batch: the same as in the forward.
        """
        ...

    def cross_entropy(
        self, hidden: torch.Tensor, lm_head: LmHead, batch: FlatBatch, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute the loss of each token, and the gradient through the LM head in the same pass.

        Only tokens with a loss have logits, and only some of them at a time (`MAX_LOGITS` of the implementation).

        Args:
            hidden: (T, H) after the last norm.
            lm_head: the LM head.
            batch: targets, and the loss weight of each slot.
            with_gradient: whether to compute the gradient.

        Returns:
            Losses (T,) in float32, in nats and not weighted. Hits (T,) in float32: 1 where the target is the likeliest
            token, of equal ones the first. Both are 0 where a token has no target. The gradient (T, H) of the sum of
            the weighted losses, or None.
        """
        ...

    def sum_by_slot(self, values: torch.Tensor, batch: FlatBatch, num_slots: int) -> torch.Tensor:
        """Sum values over the tokens of each slot, always in the same order: (T,) to (S,), both float32."""
        ...

    def update(self, adapters: Adapters, batch: FlatBatch) -> torch.Tensor:
        """Clip, make the AdamW step (arXiv 1711.05101) and clear the gradient of each slot whose batch is complete.

        A batch is complete where the table's `applies` is 1. A slot whose gradient norm is not finite does not step,
        but its gradient is cleared; its norm tells the caller.

        Returns:
            (S,) float32 norms of the gradients before clipping. Slots whose batch goes on may have any value.
        """
        ...


def ops_for(on_gpu: bool) -> Ops:
    """Return the implementation for a device: Triton kernels for a GPU, PyTorch for a CPU."""
    if on_gpu:
        from orchestrator.training.fast.ops.triton import kernels

        return kernels
    from orchestrator.training.fast.ops import reference

    return reference
