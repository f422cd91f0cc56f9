"""What all layers of a pass share, with products and norms that read it."""

from dataclasses import dataclass

import torch

from orchestrator.training.fast.ops.protocol import AttentionConfig, Ops
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch
from orchestrator.training.fast.step.modules import FusedLinear, Norm


@dataclass(frozen=True)
class PassInputs:
    """Inputs that all layers of one pass share."""

    ops: Ops
    batch: FlatBatch
    adapters: Adapters
    recompute: Recompute

    @property
    def saves_elementwise(self) -> bool:
        """Whether the forward keeps the results of operations that go element by element or row by row."""
        return self.recompute != "elementwise"

    def attention(
        self, qkv: torch.Tensor, config: AttentionConfig, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Attend within each sequence of the batch, as `Ops.attention` does."""
        return self.ops.attention(qkv, self.batch, config, sinks)

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, norm: Norm | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Add and normalize as `Ops.add_norm` does. Without a norm, return the sum twice, and None."""
        if norm is not None:
            return self.ops.add_norm(residual, delta, norm.weight, norm.epsilon)
        total = residual if delta is None else residual + delta
        return total, total, None

    def add_norm_backward(
        self,
        dresidual: torch.Tensor | None,
        dnormed: torch.Tensor,
        residual: torch.Tensor,
        rstd: torch.Tensor | None,
        norm: Norm | None,
    ) -> torch.Tensor:
        """Compute the gradient of the sum in `add_norm`."""
        if norm is None or rstd is None:
            return dnormed if dresidual is None else dresidual + dnormed
        return self.ops.add_norm_backward(dresidual, dnormed, residual, rstd, norm.weight)

    def linear(
        self, base: FusedLinear, x: torch.Tensor, group: LayerGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply layers of the base and their adapters: (T, outs), and (T, layers * R) for the backward."""
        y = base.forward(x)
        if group is None:
            return y, None
        lora_hidden = self.ops.lora_down(x, self.adapters, group, self.batch)
        self.ops.lora_up_(y, lora_hidden, self.adapters, group, self.batch)
        return y, lora_hidden

    def linear_backward(
        self,
        base: FusedLinear,
        dy: torch.Tensor,
        x: torch.Tensor,
        lora_hidden: torch.Tensor | None,
        group: LayerGroup | None,
    ) -> torch.Tensor:
        """Compute dx (T, in) from dy (T, outs), and add to the gradients of the adapters."""
        dx = base.backward(dy)
        if group is not None:
            assert lora_hidden is not None
            self.ops.lora_backward(dy, x, lora_hidden, dx, self.adapters, group, self.batch)
        return dx
