"""The frozen linear layers and norms of the base, with the weights of a Hugging Face model."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from orchestrator.training.fast.families.family import ExpertNames, Family
from orchestrator.training.fast.shard.base import stored


class FusedLinear:
    """Frozen linear layers that read the same input, as one product: (T, in) -> (T, sum of outs)."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, keeps_base: bool) -> None:
        """Read the layers' weights and biases.

        Args:
            layers: `Linear`, or `Linear4bit` of bitsandbytes.
            dtype: of the products.
            keeps_base: whether to dequantize once and keep the result, instead of at each product.
        """
        self._layers = layers
        self._dtype = dtype
        self._kept: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            self.bias = torch.cat(
                [
                    layer.weight.new_zeros(layer.out_features, dtype=dtype)
                    if layer.bias is None
                    else layer.bias.detach().to(dtype)
                    for layer in layers
                ]
            )
        if keeps_base:
            self._kept = self._dequantized()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight(), self.bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """Compute dx: (T, sum of outs) -> (T, in)."""
        return dy @ self._weight()

    def _weight(self) -> torch.Tensor:
        return self._dequantized() if self._kept is None else self._kept

    def _dequantized(self) -> torch.Tensor:
        """Return (sum of outs, in), exactly the numbers that QLoRA multiplies by."""
        weights = [_dequantized(*stored(layer.weight)) for layer in self._layers]
        return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(self._dtype)


def _dequantized(weight: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """Return a 4-bit weight of bitsandbytes as floats; without a `quant_state` it already is."""
    if quant_state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dequantized: torch.Tensor = dequantize_4bit(weight, quant_state)
    return dequantized


class ExpertMatrices:
    """One frozen matrix of each expert of a layer, (E, out, in)."""

    def __init__(self, experts: Any, name: str, names: ExpertNames, dtype: torch.dtype, keeps_base: bool) -> None:
        """Read the matrices, and their biases.

        Args:
            experts: the experts' module of transformers.
            name: of the parameter that holds the matrices.
            names: of the family.
            dtype: of the products.
            keeps_base: as in `FusedLinear`.
        """
        self._stored, self._is_transposed, self._dtype = getattr(experts, name), names.is_transposed, dtype
        self.bias: torch.Tensor | None = (
            getattr(experts, f"{name}_bias").detach().to(dtype) if names.has_biases else None
        )
        """(E, out)."""
        self._kept = self._dequantized() if keeps_base else None

    def forward(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Multiply rows by the matrices of their experts.

        Args:
            rows: (rows, in), sorted by expert.
            ends: (E,) int32, the end of each expert's rows.

        Returns:
            (rows, out).
        """
        products = F.grouped_mm(rows, self._weight().mT, offs=ends)
        if self.bias is not None:
            row = torch.arange(len(rows), dtype=ends.dtype, device=ends.device)
            products += self.bias[torch.searchsorted(ends, row, right=True)]
        return products

    def backward(self, drows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Compute the gradient of the rows: (rows, out) -> (rows, in)."""
        return F.grouped_mm(drows, self._weight(), offs=ends)

    def _weight(self) -> torch.Tensor:
        return self._dequantized() if self._kept is None else self._kept

    def _dequantized(self) -> torch.Tensor:
        """Return (E, out, in)."""
        if type(self._stored) is not torch.nn.Parameter:  # `PackedExperts`, whose import takes seconds
            return self._stored.dequantized().to(self._dtype)
        weights = self._stored.detach()
        return (weights.mT if self._is_transposed else weights).to(self._dtype)


class Norm:
    """An RMSNorm of the base."""

    def __init__(self, module: Any, family: Family, epsilon: float) -> None:
        """Take a norm's weight, in the form in which the family multiplies by it.

        Args:
            module: of transformers.
            family: of the base.
            epsilon: added to the mean square.
        """
        weight = module.weight.detach()
        if family.norm_weight != "plain":
            weight = weight.float() + (1 if family.norm_weight == "plus_one" else 0)
        self.weight: torch.Tensor = weight
        self.epsilon = epsilon
