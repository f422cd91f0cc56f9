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

if TYPE_CHECKING:
    from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
    from orchestrator.training.fast.step.flat_batch import FlatBatch


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of the attention heads, and the tables of the rotary embedding."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key heads, and as many value heads. Consecutive query heads share one."""
    head_dim: int
    cos: torch.Tensor
    """(positions, D). The second half of each row repeats the first."""
    sin: torch.Tensor
    """(positions, D), as `cos`."""


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
            weight: (H,) of the norm.
            epsilon: added to the mean square.

        Returns:
            The sum (T, H), the normalized sum (T, H), and its reciprocal root mean square (T,) in float32.
        """
        ...

    def add_norm_backward(
        self,
        dresidual: torch.Tensor,
        dnormed: torch.Tensor,
        residual: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the gradient of the sum in `add_norm`, which is also the gradient of both its terms.

        Args:
            dresidual: (T, H) gradient that reaches the sum through the residual stream.
            dnormed: (T, H) gradient of the normalized sum.
            residual: (T, H) the sum.
            rstd: (T,) float32 from `add_norm`.
            weight: (H,) of the norm.

        Returns:
            (T, H).
        """
        ...

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Compute silu(gate) * up (arXiv 2002.05202): (T, 2 I), gate first, to (T, I)."""
        ...

    def swiglu_backward(self, dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """Compute the gradient of `gate_up` (T, 2 I) from that of the result (T, I)."""
        ...

    def attention(
        self, qkv: torch.Tensor, batch: FlatBatch, config: AttentionConfig
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Rotate queries and keys (RoPE, arXiv 2104.09864), then attend causally within each sequence.

        Args:
            qkv: (T, (num_heads + 2 num_kv_heads) * D), queries first. It may be overwritten.
            batch: positions and sequence bounds.
            config: sizes and rotary tables.

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
            batch: slots and scales (alpha / rank) of the tokens.
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
        self, hidden: torch.Tensor, lm_head: torch.Tensor, batch: FlatBatch, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute the loss of each token, and the gradient through the LM head in the same pass.

        Only the logits of some tokens exist at a time (`MAX_LOGITS` of the implementation).

        Args:
            hidden: (T, H) after the last norm.
            lm_head: (V, H).
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
