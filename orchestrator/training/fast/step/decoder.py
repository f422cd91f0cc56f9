"""A decoder with attention and gated MLPs on a flat batch, forward and backward, with a Hugging Face model's weights.

The base is frozen, so that its backward is one matrix product for each layer and no gradient of a weight. What the
backward needs is either saved by the forward or computed again, as the memory plan says (`plan.memory.Recompute`).

    residual1 -> norm1 -> qkv -> attention -> out -> + -> residual2 -> norm2 -> gate_up -> glu -> down -> +
        |                                            ^        |                                           ^
        +--------------------------------------------+        +-------------------------------------------+

qkv, out, gate_up and down are products with the base's weights, each with the adapters of its group on top. A family
(`families`) may have norms of queries and keys, norms of `out` and `down` before they are added, or no norm1 and norm2.
The backward goes through the same operations in the opposite order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.settings import LayerKind, Settings
from orchestrator.training.fast.ops.protocol import AttentionConfig, LmHead, Ops
from orchestrator.training.fast.sizes import Recompute
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import FlatBatch


def adapted_layers(model: Any, names: Collection[str]) -> list[list[AdaptedLayer]]:
    """List the layers to adapt by the input that they share: the family's groups of the first decoder layer, and so on.

    Args:
        model: the base, without adapters.
        names: modules to adapt, by their full names.
    """
    family = FAMILIES[model.config.model_type]
    groups, module_id = [], 0
    for index, layer in enumerate(model.model.layers):
        for group in family.groups:
            adapted, column = [], 0
            for name in group:
                linear = layer.get_submodule(name)
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
    gate_up: torch.Tensor
    """(T, 2 I)."""
    mlp_hidden: torch.Tensor | None
    """(T, I) activation(gate) * up. May be computed again."""
    down: torch.Tensor | None
    """(T, H) before the norm after the MLP."""
    down_rstd: torch.Tensor | None
    """(T,) float32."""
    lora_hidden: list[torch.Tensor | None]
    """For each group the (T, layers * R) between A and B; None where no layer is adapted."""


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

        self.qkv, self.out, self.gate_up, self.down = (
            FusedLinear([layer.get_submodule(name) for name in names], dtype, keeps_base) for names in family.groups
        )
        self.norm1, self.norm2 = norm(family.norms.before_attention), norm(family.norms.before_mlp)
        self.out_norm, self.down_norm = norm(family.norms.after_attention), norm(family.norms.after_mlp)
        self.q_norm, self.k_norm = map(norm, family.qk_norms or (None, None))
        self._activation = family.activation
        self._residual_scale = settings.residual_scale
        self._config = config

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
            groups: adapters of the layer, in the order of the family's groups.
            saves: whether a backward will need the activations.

        Returns:
            The residual sum after attention (T, H), the output of the MLP (T, H), and the saved activations.
        """
        ops, (qkv_group, out_group, gate_up_group, down_group) = inputs.ops, groups
        residual1, normed1, rstd1 = inputs.add_norm(residual, delta, self.norm1)
        qkv, qkv_hidden = inputs.linear(self.qkv, normed1, qkv_group)
        unnormed_qkv, qk_rstd = None, None
        if self.q_norm is not None and self.k_norm is not None:
            unnormed_qkv = qkv
            qkv, qk_rstd = ops.qk_norm(qkv, self.q_norm.weight, self.k_norm.weight, self.q_norm.epsilon, self._config)
        attention, saved_attention = ops.attention(qkv, inputs.batch, self._config)
        out, out_hidden = inputs.linear(self.out, attention, out_group)
        out_delta, out_rstd = self._delta(out, self.out_norm, inputs)
        residual2, normed2, rstd2 = inputs.add_norm(residual1, out_delta, self.norm2)
        gate_up, gate_up_hidden = inputs.linear(self.gate_up, normed2, gate_up_group)
        mlp_hidden = ops.glu(gate_up, self._activation)
        down, down_hidden = inputs.linear(self.down, mlp_hidden, down_group)
        down_delta, down_rstd = self._delta(down, self.down_norm, inputs)
        if not saves:
            return residual2, down_delta, None
        saves_elementwise = inputs.recompute != "elementwise"
        saved = SavedActivations(
            residual1=residual1,
            rstd1=rstd1,
            normed1=normed1 if saves_elementwise else None,
            qkv=unnormed_qkv,
            qk_rstd=qk_rstd,
            saved_attention=saved_attention,
            attention=attention,
            out=None if self.out_norm is None else out,
            out_rstd=out_rstd,
            residual2=residual2,
            rstd2=rstd2,
            normed2=normed2 if saves_elementwise else None,
            gate_up=gate_up,
            mlp_hidden=mlp_hidden if saves_elementwise else None,
            down=None if self.down_norm is None else down,
            down_rstd=down_rstd,
            lora_hidden=[qkv_hidden, out_hidden, gate_up_hidden, down_hidden],
        )
        return residual2, down_delta, saved

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
        ddown = self._delta_backward(dresidual, saved.down, saved.down_rstd, self.down_norm, inputs)
        mlp_hidden = ops.glu(saved.gate_up, self._activation) if saved.mlp_hidden is None else saved.mlp_hidden
        dmlp_hidden = inputs.linear_backward(self.down, ddown, mlp_hidden, down_hidden, down_group)
        dgate_up = ops.glu_backward(dmlp_hidden, saved.gate_up, self._activation)
        normed2 = inputs.add_norm(saved.residual2, None, self.norm2)[1] if saved.normed2 is None else saved.normed2
        dnormed2 = inputs.linear_backward(self.gate_up, dgate_up, normed2, gate_up_hidden, gate_up_group)
        dresidual = inputs.add_norm_backward(dresidual, dnormed2, saved.residual2, saved.rstd2, self.norm2)
        dout = self._delta_backward(dresidual, saved.out, saved.out_rstd, self.out_norm, inputs)
        dattention = inputs.linear_backward(self.out, dout, saved.attention, out_hidden, out_group)
        dqkv = ops.attention_backward(dattention, saved.saved_attention, inputs.batch, self._config)
        if saved.qkv is not None and saved.qk_rstd is not None:
            assert self.q_norm is not None
            assert self.k_norm is not None
            weights = self.q_norm.weight, self.k_norm.weight
            ops.qk_norm_backward_(dqkv, saved.qkv, saved.qk_rstd, *weights, self._config)
        normed1 = inputs.add_norm(saved.residual1, None, self.norm1)[1] if saved.normed1 is None else saved.normed1
        dnormed1 = inputs.linear_backward(self.qkv, dqkv, normed1, qkv_hidden, qkv_group)
        return inputs.add_norm_backward(dresidual, dnormed1, saved.residual1, saved.rstd1, self.norm1)

    def _delta(
        self, x: torch.Tensor, norm: Norm | None, inputs: "PassInputs"
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
        inputs: "PassInputs",
    ) -> torch.Tensor:
        """Compute the gradient of the input of `_delta` from that of its result."""
        ddelta = dresidual if self._residual_scale == 1 else dresidual * self._residual_scale
        return ddelta if x is None else inputs.add_norm_backward(None, ddelta, x, rstd, norm)


@dataclass(frozen=True)
class PassInputs:
    """Inputs that all layers of one pass share."""

    ops: Ops
    batch: FlatBatch
    adapters: Adapters
    recompute: Recompute

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
        family = FAMILIES[config.model_type]
        settings, epsilon = Settings.of(config, family), config.rms_norm_eps
        self.longest = longest
        self.keeps_base = keeps_base
        self._embedding = inner.embed_tokens.weight.detach()
        self._embedding_scale = settings.embedding_scale
        if family.scales_embedding:  # transformers rounds it to the embedding's dtype
            self._embedding_scale = torch.tensor(self._embedding_scale, dtype=dtype).item()
        self._norm = Norm(inner.norm, family, epsilon)
        weight = model.get_output_embeddings().weight.detach()
        self._lm_head = LmHead(weight, settings.logits_divisor, settings.logits_softcap)
        shape = BaseShape.of(config)
        configs = {
            kind: _attention_config(inner.rotary_emb, kind, shape, settings, dtype, longest, weight.device)
            for kind in dict.fromkeys(settings.kinds)
        }
        self._layers = [
            Layer(layer, family, settings, configs[kind], dtype, epsilon, keeps_base)
            for layer, kind in zip(inner.layers, settings.kinds, strict=True)
        ]

    def train(self, inputs: PassInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a forward and a backward pass, and add to the gradients of the adapters.

        Returns:
            (T,) losses and (T,) hits, as from `Ops.cross_entropy`.
        """
        ops, layers = inputs.ops, list(zip(self._layers, self._groups(inputs.adapters), strict=True))
        residual, delta = self._embed(inputs), None
        passes: list[Any] = []  # for each layer its saved activations, or its input where it is computed again
        for layer, groups in layers:
            layer_input = (residual, delta)
            saves = inputs.recompute != "layers"
            residual, delta, saved = layer.forward(*layer_input, inputs, groups, saves)
            passes.append(layer_input if saved is None else saved)
        residual, normed, rstd = inputs.add_norm(residual, delta, self._norm)
        losses, hits, dnormed = ops.cross_entropy(normed, self._lm_head, inputs.batch, with_gradient=True)
        assert dnormed is not None
        dresidual = inputs.add_norm_backward(None, dnormed, residual, rstd, self._norm)
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
        residual, delta = self._embed(inputs), None
        for layer, groups in zip(self._layers, self._groups(inputs.adapters), strict=True):
            residual, delta, _ = layer.forward(residual, delta, inputs, groups, False)
        normed = inputs.add_norm(residual, delta, self._norm)[1]
        losses, hits, _ = ops.cross_entropy(normed, self._lm_head, inputs.batch, with_gradient=False)
        return losses, hits

    def _embed(self, inputs: PassInputs) -> torch.Tensor:
        """Return the embeddings of the tokens, (T, H)."""
        embedded = F.embedding(inputs.batch.ids, self._embedding)
        return embedded if self._embedding_scale == 1 else embedded * self._embedding_scale

    def _groups(self, adapters: Adapters) -> list[Sequence[LayerGroup | None]]:
        """Return for each decoder layer its groups in the order of the family; None where nothing is adapted."""
        groups, per_layer = adapters.groups, len(adapters.groups) // len(self._layers)
        return [groups[at : at + per_layer] for at in range(0, len(groups), per_layer)]


def _attention_config(
    rotary_embedding: Any,
    kind: LayerKind,
    shape: BaseShape,
    settings: Settings,
    dtype: torch.dtype,
    longest: int,
    device: torch.device,
) -> AttentionConfig:
    """Describe the attention of the layers of one kind.

    Args:
        rotary_embedding: of transformers. It computes the tables.
        kind: of the layers.
        shape: sizes of the base.
        settings: of the base.
        dtype: of the tables.
        longest: positions in the tables.
        device: of the tables.
    """
    positions = torch.arange(longest, device=device)[None]
    arguments = () if kind.rope is None else (kind.rope,)
    cos, sin = (
        table[0] for table in rotary_embedding(torch.empty(0, dtype=dtype, device=device), positions, *arguments)
    )
    if not kind.is_rotated:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    return AttentionConfig(
        shape.queries,
        shape.keys,
        shape.head_size,
        cos,
        sin,
        settings.attention_scale,
        kind.window,
        settings.attention_softcap,
    )
