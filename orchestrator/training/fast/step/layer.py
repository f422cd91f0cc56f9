"""A decoder layer on a flat batch, forward and backward: attention, and a gated MLP or experts.

The base is frozen, so that its backward is one matrix product for each layer and no gradient of a weight. What the
backward needs is either saved by the forward or computed again, as the memory plan says (`plan.memory.Recompute`).

    residual1 -> norm1 -> qkv -> attention -> out -> + -> residual2 -> norm2 -> MLP -> +
        |                                            ^        |                        ^
        +--------------------------------------------+        +------------------------+

qkv and out are products with the base's weights, each with the adapters of its group on top; so are those of the MLP
(`mlp`). A family (`families`) may have experts in its place (`experts`), norms of queries and keys, norms of `out` and
of the MLP's output before they are added, or no norm1 and norm2.
The backward goes through the same operations in the opposite order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.settings import Settings
from orchestrator.training.fast.ops.protocol import AttentionConfig
from orchestrator.training.fast.step.adapters import LayerGroup
from orchestrator.training.fast.step.experts import Experts
from orchestrator.training.fast.step.mlp import GatedMlp, Mlp
from orchestrator.training.fast.step.modules import FusedLinear, Norm
from orchestrator.training.fast.step.pass_inputs import PassInputs


@dataclass
class SavedActivations:
    """Activations that the forward of a layer leaves for its backward.

    A tensor is None where the family has no such norm, or, if its comment says so, where it is computed again.
    """

    residual1: torch.Tensor
    """(T, H) residual sum that the layer reads."""
    rstd1: torch.Tensor | None
    """(T,) float32."""
    normed1: torch.Tensor | None
    """(T, H). May be computed again."""
    qkv: torch.Tensor | None
    """(T, qkv) before the norms of queries and keys."""
    qk_rstd: torch.Tensor | None
    """(T, norms) float32."""
    saved_attention: tuple[torch.Tensor, ...]
    """Tensors from `Ops.attention` for `Ops.attention_backward`."""
    attention: torch.Tensor
    """(T, num_heads * D)."""
    out: torch.Tensor | None
    """(T, H) before the norm after attention."""
    out_rstd: torch.Tensor | None
    """(T,) float32."""
    residual2: torch.Tensor
    """(T, H) residual sum after attention."""
    rstd2: torch.Tensor | None
    """(T,) float32."""
    normed2: torch.Tensor | None
    """(T, H). May be computed again."""
    mlp: Any
    """From the forward of the MLP."""
    mlp_output: torch.Tensor | None
    """(T, H) before the norm after the MLP."""
    mlp_output_rstd: torch.Tensor | None
    """(T,) float32."""
    lora_hidden: tuple[torch.Tensor | None, torch.Tensor | None]
    """For qkv and out the (T, layers * R) between A and B; None where no layer is adapted."""


class Layer:
    """One decoder layer."""

    def __init__(
        self,
        layer: Any,
        family: Family,
        settings: Settings,
        config: AttentionConfig,
        dtype: torch.dtype,
        epsilon: float,
        keeps_base: bool,
    ) -> None:
        """Take the weights of a transformers decoder layer.

        Args:
            layer: the decoder layer.
            family: of the base.
            settings: of the base.
            config: of the layer's attention.
            dtype: of the products.
            epsilon: of the norms.
            keeps_base: as in `Decoder`.
        """

        def norm(name: str | None) -> Norm | None:
            return None if name is None else Norm(layer.get_submodule(name), family, epsilon)

        self.qkv, self.out = (
            FusedLinear([layer.get_submodule(name) for name in names], dtype, keeps_base) for names in family.groups[:2]
        )
        self.mlp: Mlp = (
            Experts(layer, family, settings, dtype, keeps_base)
            if family.has_experts(layer)
            else GatedMlp(layer, family, dtype, keeps_base)
        )
        self._sinks = None if family.sinks is None else layer.get_parameter(family.sinks).detach()
        self.norm1, self.norm2 = norm(family.norms.before_attention), norm(family.norms.before_mlp)
        self.out_norm, self.mlp_norm = norm(family.norms.after_attention), norm(family.norms.after_mlp)
        self.q_norm, self.k_norm = map(norm, family.qk_norms or (None, None))
        self._residual_scale = settings.residual_scale
        self.attention_config = config

    def forward(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        inputs: PassInputs,
        groups: Sequence[LayerGroup | None],
        saves: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedActivations | None]:
        """Compute the layer up to the last addition, which the next norm does.

        Args:
            residual: (T, H) residual sum before the previous layer's MLP was added.
            delta: (T, H) output of that MLP; None for the first layer.
            inputs: of the pass.
            groups: adapters of the layer, in the order of the family's groups.
            saves: whether a backward will need the activations.

        Returns:
            The residual sum after attention (T, H), the output of the MLP (T, H), and the saved activations.
        """
        ops, (qkv_group, out_group, *mlp_groups) = inputs.ops, groups
        residual1, normed1, rstd1 = inputs.add_norm(residual, delta, self.norm1)
        qkv, qkv_hidden = inputs.linear(self.qkv, normed1, qkv_group)
        unnormed_qkv, qk_rstd = None, None
        if self.q_norm is not None and self.k_norm is not None:
            unnormed_qkv = qkv
            qkv, qk_rstd = ops.qk_norm(
                qkv, self.q_norm.weight, self.k_norm.weight, self.q_norm.epsilon, self.attention_config
            )
        attention, saved_attention = inputs.attention(qkv, self.attention_config, self._sinks)
        out, out_hidden = inputs.linear(self.out, attention, out_group)
        out_delta, out_rstd = self._delta(out, self.out_norm, inputs)
        residual2, normed2, rstd2 = inputs.add_norm(residual1, out_delta, self.norm2)
        mlp_output, saved_mlp = self.mlp.forward(normed2, inputs, mlp_groups)
        mlp_delta, mlp_output_rstd = self._delta(mlp_output, self.mlp_norm, inputs)
        if not saves:
            return residual2, mlp_delta, None
        saved = SavedActivations(
            residual1=residual1,
            rstd1=rstd1,
            normed1=normed1 if inputs.saves_elementwise else None,
            qkv=unnormed_qkv,
            qk_rstd=qk_rstd,
            saved_attention=saved_attention,
            attention=attention,
            out=None if self.out_norm is None else out,
            out_rstd=out_rstd,
            residual2=residual2,
            rstd2=rstd2,
            normed2=normed2 if inputs.saves_elementwise else None,
            mlp=saved_mlp,
            mlp_output=None if self.mlp_norm is None else mlp_output,
            mlp_output_rstd=mlp_output_rstd,
            lora_hidden=(qkv_hidden, out_hidden),
        )
        return residual2, mlp_delta, saved

    def backward(
        self,
        dresidual: torch.Tensor,
        saved: SavedActivations,
        inputs: PassInputs,
        groups: Sequence[LayerGroup | None],
    ) -> torch.Tensor:
        """Compute the gradient of the residual sum before the layer from that after it: (T, H) -> (T, H)."""
        ops, (qkv_group, out_group, *mlp_groups) = inputs.ops, groups
        qkv_hidden, out_hidden = saved.lora_hidden
        dmlp = self._delta_backward(dresidual, saved.mlp_output, saved.mlp_output_rstd, self.mlp_norm, inputs)
        normed2 = inputs.add_norm(saved.residual2, None, self.norm2)[1] if saved.normed2 is None else saved.normed2
        dnormed2 = self.mlp.backward(dmlp, normed2, saved.mlp, inputs, mlp_groups)
        dresidual = inputs.add_norm_backward(dresidual, dnormed2, saved.residual2, saved.rstd2, self.norm2)
        dout = self._delta_backward(dresidual, saved.out, saved.out_rstd, self.out_norm, inputs)
        dattention = inputs.linear_backward(self.out, dout, saved.attention, out_hidden, out_group)
        dqkv = ops.attention_backward(dattention, saved.saved_attention, inputs.batch, self.attention_config)
        if saved.qkv is not None and saved.qk_rstd is not None:
            assert self.q_norm is not None
            assert self.k_norm is not None
            weights = self.q_norm.weight, self.k_norm.weight
            ops.qk_norm_backward_(dqkv, saved.qkv, saved.qk_rstd, *weights, self.attention_config)
        normed1 = inputs.add_norm(saved.residual1, None, self.norm1)[1] if saved.normed1 is None else saved.normed1
        dnormed1 = inputs.linear_backward(self.qkv, dqkv, normed1, qkv_hidden, qkv_group)
        return inputs.add_norm_backward(dresidual, dnormed1, saved.residual1, saved.rstd1, self.norm1)

    def _delta(
        self, x: torch.Tensor, norm: Norm | None, inputs: PassInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Turn the output of attention or MLP (T, H) into what is added to the residual stream; also return rstd."""
        rstd = None
        if norm is not None:
            _, x, rstd = inputs.add_norm(x, None, norm)
        return (x if self._residual_scale == 1 else x * self._residual_scale), rstd

    def _delta_backward(
        self,
        dresidual: torch.Tensor,
        x: torch.Tensor | None,
        rstd: torch.Tensor | None,
        norm: Norm | None,
        inputs: PassInputs,
    ) -> torch.Tensor:
        """Compute the gradient of the input of `_delta` from that of its result."""
        ddelta = dresidual if self._residual_scale == 1 else dresidual * self._residual_scale
        return ddelta if x is None else inputs.add_norm_backward(None, ddelta, x, rstd, norm)
