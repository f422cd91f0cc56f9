"""The MLP of a decoder layer: two products with a gated activation between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.step.adapters import LayerGroup
from orchestrator.training.fast.step.modules import FusedLinear
from orchestrator.training.fast.step.pass_inputs import PassInputs


class Mlp(Protocol):
    """What follows the second norm of a decoder layer, up to the residual sum."""

    def forward(
        self, x: torch.Tensor, inputs: PassInputs, groups: Sequence[LayerGroup | None]
    ) -> tuple[torch.Tensor, Any]:
        """Return the output (T, H) for x (T, H), and what `backward` needs.

        Args:
            x: normed residual sum.
            inputs: of the pass.
            groups: adapters of the MLP's linear layers.
        """
        ...

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        saved: Any,
        inputs: PassInputs,
        groups: Sequence[LayerGroup | None],
    ) -> torch.Tensor:
        """Compute dx (T, H) from dy (T, H), and add to the gradients of the adapters."""
        ...


@dataclass(frozen=True)
class SavedMlp:
    """Activations that the forward of a `GatedMlp` leaves for its backward."""

    gate_up: torch.Tensor
    """(T, 2 I)."""
    hidden: torch.Tensor | None
    """(T, I) activation(gate) * up. May be computed again."""
    gate_up_lora: torch.Tensor | None
    """(T, layers * R) between A and B; None where no layer is adapted."""
    down_lora: torch.Tensor | None
    """(T, R)."""


class GatedMlp:
    """Gate and up, activation, down; each product with the adapters of its group on top."""

    def __init__(self, layer: Any, family: Family, dtype: torch.dtype, keeps_base: bool) -> None:
        """Take the weights of a transformers decoder layer; arguments as in `Layer`."""
        self._gate_up, self._down = (
            FusedLinear([layer.get_submodule(name) for name in names], dtype, keeps_base) for names in family.groups[2:]
        )
        self._activation = family.activation

    def forward(
        self, x: torch.Tensor, inputs: PassInputs, groups: Sequence[LayerGroup | None]
    ) -> tuple[torch.Tensor, SavedMlp]:
        gate_up_group, down_group = groups
        gate_up, gate_up_lora = inputs.linear(self._gate_up, x, gate_up_group)
        hidden = inputs.ops.glu(gate_up, self._activation)
        down, down_lora = inputs.linear(self._down, hidden, down_group)
        return down, SavedMlp(gate_up, hidden if inputs.saves_elementwise else None, gate_up_lora, down_lora)

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        saved: SavedMlp,
        inputs: PassInputs,
        groups: Sequence[LayerGroup | None],
    ) -> torch.Tensor:
        gate_up_group, down_group = groups
        hidden = inputs.ops.glu(saved.gate_up, self._activation) if saved.hidden is None else saved.hidden
        dhidden = inputs.linear_backward(self._down, dy, hidden, saved.down_lora, down_group)
        dgate_up = inputs.ops.glu_backward(dhidden, saved.gate_up, self._activation)
        return inputs.linear_backward(self._gate_up, dgate_up, x, saved.gate_up_lora, gate_up_group)
