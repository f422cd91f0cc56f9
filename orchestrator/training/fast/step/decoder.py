"""A Llama-like decoder over a flat row, forward and backward, on the weights of a Hugging Face model.

The base is frozen, so that its backward is one product a layer; what the backward needs is kept, or computed again, as
the memory plan says. Each step of the forward stands in the backward in the opposite order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.ops.reference import Attended, Heads
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers of a decoder layer by the input that they share."""


def adapted_layers(model: Any, names: Collection[str]) -> list[list[AdaptedLayer]]:
    """Layers to adapt by the input that they share: `GROUPS` of the first decoder layer, of the second, and so on.

    Args:
        model: the bare base.
        names: modules to adapt.
    """
    places, number = [], 0
    for index, layer in enumerate(model.model.layers):
        children = {name.rpartition(".")[2]: (name, module) for name, module in layer.named_modules()}
        for group in GROUPS:
            adapted, column = [], 0
            for leaf in group:
                name, linear = children[leaf]
                if (path := f"model.layers.{index}.{name}") in names:
                    adapted.append(AdaptedLayer(path, number, linear.in_features, column, linear.out_features))
                column += linear.out_features
                number += 1
            places.append(adapted)
    return places


class Linears:
    """Linear layers that read one input, as one product: (T, in) -> (T, sum of outs)."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, keeps: bool) -> None:
        """
        Args:
            layers: `Linear` or bitsandbytes' `Linear4bit`.
            dtype: of the products.
            keeps: dequantise once and keep, instead of at each product.
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
        if keeps:
            self._kept = self._dequantised()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight(), self.bias)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """(T, sum of outs) -> (T, in)."""
        return gradient @ self._weight()

    def _weight(self) -> torch.Tensor:
        return self._dequantised() if self._kept is None else self._kept

    def _dequantised(self) -> torch.Tensor:
        """(sum of outs, in), the very numbers that QLoRA multiplies by."""
        weights = [
            _dequantised(layer.weight.detach(), getattr(layer.weight, "quant_state", None)) for layer in self._layers
        ]
        return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(self._dtype)


def _dequantised(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """As floats what bitsandbytes holds in 4 bits; without a `state` it is floats already."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dequantised: torch.Tensor = dequantize_4bit(weight, state)
    return dequantised


@dataclass
class SavedActivations:
    """What a layer's forward leaves for its backward; None is computed again."""

    states: torch.Tensor
    """(T, H) residual sum that the layer read."""
    root1: torch.Tensor
    normed1: torch.Tensor | None
    attended: Attended
    attention: torch.Tensor
    middle: torch.Tensor
    """(T, H) residual sum after attention."""
    root2: torch.Tensor
    normed2: torch.Tensor | None
    gate_up: torch.Tensor
    product: torch.Tensor | None
    lows: list[torch.Tensor | None]
    """Of each group, the (T, layers * rank) between A and B."""


class Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, dtype: torch.dtype, keeps: bool, heads: Heads, epsilon: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, out, gate_up, down = (
            [getattr(attention if hasattr(attention, name) else mlp, name) for name in names] for names in GROUPS
        )
        self.qkv, self.out, self.gate_up, self.down = (
            Linears(layers, dtype, keeps) for layers in (qkv, out, gate_up, down)
        )
        self.norm1 = layer.input_layernorm.weight.detach()
        self.norm2 = layer.post_attention_layernorm.weight.detach()
        self._heads = heads
        self._epsilon = epsilon

    def forward(
        self,
        states: torch.Tensor,
        delta: torch.Tensor | None,
        step: "PassInputs",
        groups: Sequence[LayerGroup | None],
        keeps: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedActivations | None]:
        """Residual sum after attention and what the MLP adds to it, which the next norm sums: (T, H), (T, H)."""
        ops, (for_qkv, for_out, for_gate_up, for_down) = step.ops, groups
        states, normed1, root1 = ops.add_norm(states, delta, self.norm1, self._epsilon)
        qkv, low_qkv = step.adapted(self.qkv, normed1, for_qkv)
        attention, attended = ops.attention(qkv, step.row, self._heads)
        out, low_out = step.adapted(self.out, attention, for_out)
        middle, normed2, root2 = ops.add_norm(states, out, self.norm2, self._epsilon)
        gate_up, low_gate_up = step.adapted(self.gate_up, normed2, for_gate_up)
        product = ops.swiglu(gate_up)
        down, low_down = step.adapted(self.down, product, for_down)
        if not keeps:
            return middle, down, None
        everything = step.recompute != "elementwise"
        kept = SavedActivations(
            states,
            root1,
            normed1 if everything else None,
            attended,
            attention,
            middle,
            root2,
            normed2 if everything else None,
            gate_up,
            product if everything else None,
            [low_qkv, low_out, low_gate_up, low_down],
        )
        return middle, down, kept

    def backward(
        self, gradient: torch.Tensor, kept: SavedActivations, step: "PassInputs", groups: Sequence[LayerGroup | None]
    ) -> torch.Tensor:
        """From the gradient of the residual sum after the layer to that of the sum before it, (T, H)."""
        ops, (for_qkv, for_out, for_gate_up, for_down) = step.ops, groups
        low_qkv, low_out, low_gate_up, low_down = kept.lows
        product = ops.swiglu(kept.gate_up) if kept.product is None else kept.product
        by_product = step.adapted_backward(self.down, gradient, product, low_down, for_down)
        by_gate_up = ops.swiglu_backward(by_product, kept.gate_up)
        normed2 = self._normed(kept.middle, self.norm2, step) if kept.normed2 is None else kept.normed2
        by_normed2 = step.adapted_backward(self.gate_up, by_gate_up, normed2, low_gate_up, for_gate_up)
        gradient = ops.add_norm_backward(gradient, by_normed2, kept.middle, kept.root2, self.norm2)
        by_attention = step.adapted_backward(self.out, gradient, kept.attention, low_out, for_out)
        by_qkv = ops.attention_backward(by_attention, kept.attended, step.row, self._heads)
        normed1 = self._normed(kept.states, self.norm1, step) if kept.normed1 is None else kept.normed1
        by_normed1 = step.adapted_backward(self.qkv, by_qkv, normed1, low_qkv, for_qkv)
        return ops.add_norm_backward(gradient, by_normed1, kept.states, kept.root1, self.norm1)

    def _normed(self, states: torch.Tensor, weight: torch.Tensor, step: "PassInputs") -> torch.Tensor:
        normed: torch.Tensor = step.ops.add_norm(states, None, weight, self._epsilon)[1]
        return normed


@dataclass(frozen=True)
class PassInputs:
    """What all layers of one pass share."""

    ops: ModuleType
    """`plain` or `kernels`."""
    row: FlatBatch
    adapters: Adapters
    recompute: Recompute

    def adapted(
        self, base: Linears, x: torch.Tensor, group: LayerGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Base and adapters of a group: (T, outs), and (T, layers * rank) for the backward."""
        y = base.forward(x)
        if group is None:
            return y, None
        low = self.ops.lora_down(x, self.adapters, group, self.row)
        self.ops.lora_up_(y, low, self.adapters, group, self.row)
        return y, low

    def adapted_backward(
        self, base: Linears, gradient: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None, group: LayerGroup | None
    ) -> torch.Tensor:
        """(T, outs) -> (T, in); the adapters' own gradients are added up where they lie."""
        by_x = base.backward(gradient)
        if group is not None:
            self.ops.lora_backward(gradient, x, low, by_x, self.adapters, group, self.row)
        return by_x


class Decoder:
    """The frozen base in the form that the fast step computes with."""

    def __init__(self, model: Any, dtype: torch.dtype, longest: int, keeps: bool) -> None:
        """
        Args:
            model: the bare base.
            dtype: of hidden states and products.
            longest: no sequence is longer.
            keeps: whether the dequantised weights stay.
        """
        inner, config = model.model, model.config
        device = inner.embed_tokens.weight.device
        self.longest = longest
        self.keeps = keeps
        positions = torch.arange(longest, device=device)[None]
        cos, sin = inner.rotary_emb(torch.empty(0, dtype=dtype, device=device), positions)
        shape = BaseShape.of(config)
        heads = Heads(shape.queries, shape.keys, shape.head_size, cos[0], sin[0])
        self._epsilon = config.rms_norm_eps
        self._embedding = inner.embed_tokens.weight.detach()
        self._norm = inner.norm.weight.detach()
        self._head = model.get_output_embeddings().weight.detach()
        self._layers = [Layer(layer, dtype, keeps, heads, self._epsilon) for layer in inner.layers]

    def train(self, step: PassInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of a row; the adapters' gradients are added up where they lie.

        Returns:
            (T,) losses and (T,) hits, as from `cross_entropy`.
        """
        layers = list(zip(self._layers, self._groups(step.adapters), strict=True))
        states, delta = F.embedding(step.row.ids, self._embedding), None
        passes: list[Any] = []  # what each layer's forward has left, or its input alone
        for layer, groups in layers:
            inputs = (states, delta)
            keeps = step.recompute != "layers"
            states, delta, kept = layer.forward(*inputs, step, groups, keeps)
            passes.append(inputs if kept is None else kept)
        states, normed, root = step.ops.add_norm(states, delta, self._norm, self._epsilon)
        losses, hits, by_normed = step.ops.cross_entropy(normed, self._head, step.row, trains=True)
        gradient = step.ops.add_norm_backward(torch.zeros_like(states), by_normed, states, root, self._norm)
        del states, delta, inputs, kept, normed, by_normed
        for layer, groups in reversed(layers):
            left = passes.pop()
            kept = (
                left if isinstance(left, SavedActivations) else layer.forward(left[0], left[1], step, groups, True)[2]
            )
            assert kept is not None
            gradient = layer.backward(gradient, kept, step, groups)
        return losses, hits

    def evaluate(self, step: PassInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward of a row: (T,) losses and (T,) hits."""
        states, delta = F.embedding(step.row.ids, self._embedding), None
        for layer, groups in zip(self._layers, self._groups(step.adapters), strict=True):
            states, delta, _ = layer.forward(states, delta, step, groups, False)
        normed = step.ops.add_norm(states, delta, self._norm, self._epsilon)[1]
        losses, hits, _ = step.ops.cross_entropy(normed, self._head, step.row, trains=False)
        return losses, hits

    @staticmethod
    def _groups(adapters: Adapters) -> list[Sequence[LayerGroup | None]]:
        """Of each layer, its groups in the order of `GROUPS`; None where nothing is adapted."""
        places = adapters.places
        return [places[at : at + len(GROUPS)] for at in range(0, len(places), len(GROUPS))]
