"""A Llama-like decoder on a flat batch, forward and backward, with the weights of a Hugging Face model.

The base is frozen, so that its backward is one matrix product for each layer and no gradient of a weight. What the
backward needs is either saved by the forward or computed again, as the memory plan says (`plan.memory.Recompute`).

    residual1 -> norm1 -> qkv -> attention -> out -> + -> residual2 -> norm2 -> gate_up -> swiglu -> down -> +
        |                                            ^        |                                              ^
        +--------------------------------------------+        +----------------------------------------------+

qkv, out, gate_up and down are products with the base's weights, each with the adapters of its group on top. The
backward goes through the same operations in the opposite order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.ops.protocol import AttentionConfig, Ops
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers of a decoder layer, grouped by the input that they share."""


def adapted_layers(model: Any, names: Collection[str]) -> list[list[AdaptedLayer]]:
    """List the layers to adapt by the input that they share: `GROUPS` of the first decoder layer, then of the second.

    Args:
        model: the base, without adapters.
        names: modules to adapt, by their full names.
    """
    groups, module_id = [], 0
    for index, layer in enumerate(model.model.layers):
        children = {name.rpartition(".")[2]: (name, module) for name, module in layer.named_modules()}
        for group in GROUPS:
            adapted, column = [], 0
            for leaf in group:
                name, linear = children[leaf]
                if (path := f"model.layers.{index}.{name}") in names:
                    adapted.append(AdaptedLayer(path, module_id, linear.in_features, column, linear.out_features))
                column += linear.out_features
                module_id += 1
            groups.append(adapted)
    return groups


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
        weights = [
            _dequantized(layer.weight.detach(), getattr(layer.weight, "quant_state", None)) for layer in self._layers
        ]
        return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(self._dtype)


def _dequantized(weight: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """Return a 4-bit weight of bitsandbytes as floats; without a `quant_state` it already is."""
    if quant_state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dequantized: torch.Tensor = dequantize_4bit(weight, quant_state)
    return dequantized


@dataclass
class SavedActivations:
    """Activations that the forward of a layer leaves for its backward. One that is None is computed again."""

    residual1: torch.Tensor
    """(T, H) residual sum that the layer reads."""
    rstd1: torch.Tensor
    """(T,) float32."""
    normed1: torch.Tensor | None
    """(T, H)."""
    saved_attention: tuple[torch.Tensor, ...]
    """Tensors from `Ops.attention` for `Ops.attention_backward`."""
    attention: torch.Tensor
    """(T, num_heads * D)."""
    residual2: torch.Tensor
    """(T, H) residual sum after attention."""
    rstd2: torch.Tensor
    """(T,) float32."""
    normed2: torch.Tensor | None
    """(T, H)."""
    gate_up: torch.Tensor
    """(T, 2 I)."""
    mlp_hidden: torch.Tensor | None
    """(T, I) silu(gate) * up."""
    lora_hidden: list[torch.Tensor | None]
    """For each of `GROUPS` the (T, layers * R) between A and B; None where no layer is adapted."""


class Layer:
    """One decoder layer."""

    def __init__(
        self, layer: Any, dtype: torch.dtype, keeps_base: bool, config: AttentionConfig, epsilon: float
    ) -> None:
        """Take the weights of a transformers decoder layer.

        Args:
            layer: the decoder layer.
            dtype: of the products.
            keeps_base: as in `Decoder`.
            config: of its attention.
            epsilon: of its norms.
        """
        attention, mlp = layer.self_attn, layer.mlp
        qkv, out, gate_up, down = (
            [getattr(attention if hasattr(attention, name) else mlp, name) for name in names] for names in GROUPS
        )
        self.qkv, self.out, self.gate_up, self.down = (
            FusedLinear(layers, dtype, keeps_base) for layers in (qkv, out, gate_up, down)
        )
        self.norm1 = layer.input_layernorm.weight.detach()
        self.norm2 = layer.post_attention_layernorm.weight.detach()
        self._config = config
        self._epsilon = epsilon

    def forward(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        inputs: "PassInputs",
        groups: Sequence[LayerGroup | None],
        saves: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedActivations | None]:
        """Compute the layer up to the last addition, which the next norm does.

        Args:
            residual: (T, H) residual sum before the previous layer's MLP was added.
            delta: (T, H) output of that MLP; None for the first layer.
            inputs: of the pass.
            groups: adapters of the layer, in the order of `GROUPS`.
            saves: whether a backward will need the activations.

        Returns:
            The residual sum after attention (T, H), the output of the MLP (T, H), and the saved activations.
        """
        ops, (qkv_group, out_group, gate_up_group, down_group) = inputs.ops, groups
        residual1, normed1, rstd1 = ops.add_norm(residual, delta, self.norm1, self._epsilon)
        qkv, qkv_hidden = inputs.linear(self.qkv, normed1, qkv_group)
        attention, saved_attention = ops.attention(qkv, inputs.batch, self._config)
        out, out_hidden = inputs.linear(self.out, attention, out_group)
        residual2, normed2, rstd2 = ops.add_norm(residual1, out, self.norm2, self._epsilon)
        gate_up, gate_up_hidden = inputs.linear(self.gate_up, normed2, gate_up_group)
        mlp_hidden = ops.swiglu(gate_up)
        down, down_hidden = inputs.linear(self.down, mlp_hidden, down_group)
        if not saves:
            return residual2, down, None
        saves_elementwise = inputs.recompute != "elementwise"
        saved = SavedActivations(
            residual1,
            rstd1,
            normed1 if saves_elementwise else None,
            saved_attention,
            attention,
            residual2,
            rstd2,
            normed2 if saves_elementwise else None,
            gate_up,
            mlp_hidden if saves_elementwise else None,
            [qkv_hidden, out_hidden, gate_up_hidden, down_hidden],
        )
        return residual2, down, saved

    def backward(
        self,
        dresidual: torch.Tensor,
        saved: SavedActivations,
        inputs: "PassInputs",
        groups: Sequence[LayerGroup | None],
    ) -> torch.Tensor:
        """Compute the gradient of the residual sum before the layer from that after it: (T, H) -> (T, H)."""
        ops, (qkv_group, out_group, gate_up_group, down_group) = inputs.ops, groups
        qkv_hidden, out_hidden, gate_up_hidden, down_hidden = saved.lora_hidden
        mlp_hidden = ops.swiglu(saved.gate_up) if saved.mlp_hidden is None else saved.mlp_hidden
        dmlp_hidden = inputs.linear_backward(self.down, dresidual, mlp_hidden, down_hidden, down_group)
        dgate_up = ops.swiglu_backward(dmlp_hidden, saved.gate_up)
        normed2 = self._normed(saved.residual2, self.norm2, inputs) if saved.normed2 is None else saved.normed2
        dnormed2 = inputs.linear_backward(self.gate_up, dgate_up, normed2, gate_up_hidden, gate_up_group)
        dresidual = ops.add_norm_backward(dresidual, dnormed2, saved.residual2, saved.rstd2, self.norm2)
        dattention = inputs.linear_backward(self.out, dresidual, saved.attention, out_hidden, out_group)
        dqkv = ops.attention_backward(dattention, saved.saved_attention, inputs.batch, self._config)
        normed1 = self._normed(saved.residual1, self.norm1, inputs) if saved.normed1 is None else saved.normed1
        dnormed1 = inputs.linear_backward(self.qkv, dqkv, normed1, qkv_hidden, qkv_group)
        return ops.add_norm_backward(dresidual, dnormed1, saved.residual1, saved.rstd1, self.norm1)

    def _normed(self, residual: torch.Tensor, weight: torch.Tensor, inputs: "PassInputs") -> torch.Tensor:
        return inputs.ops.add_norm(residual, None, weight, self._epsilon)[1]


@dataclass(frozen=True)
class PassInputs:
    """Inputs that all layers of one pass share."""

    ops: Ops
    batch: FlatBatch
    adapters: Adapters
    recompute: Recompute

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


class Decoder:
    """The frozen base, ready for passes over flat batches."""

    def __init__(self, model: Any, dtype: torch.dtype, longest: int, keeps_base: bool) -> None:
        """Take the weights of a transformers model, and compute the rotary tables.

        Args:
            model: the base, without adapters.
            dtype: of hidden states and products.
            longest: upper bound of a sequence's length in tokens.
            keeps_base: whether to keep the dequantized weights, instead of dequantizing at each use.
        """
        inner, config = model.model, model.config
        device = inner.embed_tokens.weight.device
        self.longest = longest
        self.keeps_base = keeps_base
        positions = torch.arange(longest, device=device)[None]
        cos, sin = inner.rotary_emb(torch.empty(0, dtype=dtype, device=device), positions)
        shape = BaseShape.of(config)
        attention = AttentionConfig(shape.queries, shape.keys, shape.head_size, cos[0], sin[0])
        self._epsilon = config.rms_norm_eps
        self._embedding = inner.embed_tokens.weight.detach()
        self._norm = inner.norm.weight.detach()
        self._lm_head = model.get_output_embeddings().weight.detach()
        self._layers = [Layer(layer, dtype, keeps_base, attention, self._epsilon) for layer in inner.layers]

    def train(self, inputs: PassInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a forward and a backward pass, and add to the gradients of the adapters.

        Returns:
            (T,) losses and (T,) hits, as from `Ops.cross_entropy`.
        """
        ops, layers = inputs.ops, list(zip(self._layers, self._groups(inputs.adapters), strict=True))
        residual, delta = F.embedding(inputs.batch.ids, self._embedding), None
        passes: list[Any] = []  # for each layer its saved activations, or its input where it is computed again
        for layer, groups in layers:
            layer_input = (residual, delta)
            saves = inputs.recompute != "layers"
            residual, delta, saved = layer.forward(*layer_input, inputs, groups, saves)
            passes.append(layer_input if saved is None else saved)
        residual, normed, rstd = ops.add_norm(residual, delta, self._norm, self._epsilon)
        losses, hits, dnormed = ops.cross_entropy(normed, self._lm_head, inputs.batch, with_gradient=True)
        assert dnormed is not None
        dresidual = ops.add_norm_backward(torch.zeros_like(residual), dnormed, residual, rstd, self._norm)
        del residual, delta, layer_input, saved, normed, dnormed  # what the backward does not need
        for layer, groups in reversed(layers):
            left = passes.pop()
            saved = (
                left if isinstance(left, SavedActivations) else layer.forward(left[0], left[1], inputs, groups, True)[2]
            )
            assert saved is not None
            dresidual = layer.backward(dresidual, saved, inputs, groups)
        return losses, hits

    def evaluate(self, inputs: PassInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a forward pass.

        Returns:
            (T,) losses and (T,) hits, as from `Ops.cross_entropy`.
        """
        ops = inputs.ops
        residual, delta = F.embedding(inputs.batch.ids, self._embedding), None
        for layer, groups in zip(self._layers, self._groups(inputs.adapters), strict=True):
            residual, delta, _ = layer.forward(residual, delta, inputs, groups, False)
        normed = ops.add_norm(residual, delta, self._norm, self._epsilon)[1]
        losses, hits, _ = ops.cross_entropy(normed, self._lm_head, inputs.batch, with_gradient=False)
        return losses, hits

    @staticmethod
    def _groups(adapters: Adapters) -> list[Sequence[LayerGroup | None]]:
        """Return for each decoder layer its groups in the order of `GROUPS`; None where nothing is adapted."""
        groups = adapters.groups
        return [groups[at : at + len(GROUPS)] for at in range(0, len(groups), len(GROUPS))]
