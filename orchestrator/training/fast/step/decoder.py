"""A decoder on a flat batch, forward and backward, with a Hugging Face model's weights; `layer` computes each layer."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.settings import LayerKind, Settings
from orchestrator.training.fast.families.text_model import text_model
from orchestrator.training.fast.ops.protocol import AttentionConfig, LmHead
from orchestrator.training.fast.shard.base import sharded
from orchestrator.training.fast.sizes import MAX_LOGITS
from orchestrator.training.fast.step.adapters import NO_DROPOUT, AdaptedLayer, Adapters, LayerGroup
from orchestrator.training.fast.step.experts import Experts
from orchestrator.training.fast.step.kv_cache import CachedInputs, LayerCache
from orchestrator.training.fast.step.layer import Layer, SavedActivations
from orchestrator.training.fast.step.modules import Norm
from orchestrator.training.fast.step.pass_inputs import PassInputs


def adapted_layers(model: Any, names: Collection[str]) -> list[list[AdaptedLayer]]:
    """List the layers to adapt by the input that they share: the groups of the first decoder layer, and so on.

    A decoder layer has four: queries, keys and values; output of the attention; gate and up; down. The last two are
    those of an MLP, or of all experts.

    Args:
        model: the base, without adapters.
        names: modules, and parameters of experts, to adapt, by their full names.
    """
    text = text_model(model)
    family, shape = FAMILIES[text.config.model_type], BaseShape.of(text.config)
    groups, module_id = [], 0
    for index, layer in enumerate(text.module.layers):
        for group in family.groups_of(layer):
            adapted, column = [], 0
            for name in group:
                linear = layer.get_submodule(name)
                if (path := f"{text.path}.layers.{index}.{name}") in names:
                    adapted.append(AdaptedLayer(path, module_id, linear.in_features, column, linear.out_features))
                column += linear.out_features
                module_id += 1
            if group:
                groups.append(adapted)
        if family.experts is not None and family.has_experts(layer):
            experts = _matrices_of_experts(shape, f"{text.path}.layers.{index}.{family.experts.experts}")
            groups += [[each] if each.name in names else [] for each in experts]
    return groups


def _matrices_of_experts(shape: BaseShape, module: str) -> list[AdaptedLayer]:
    """List the matrices of all experts of a layer, by the full name of the module that holds them."""
    return [
        AdaptedLayer(f"{module}.{name.rpartition('.')[2]}", NO_DROPOUT, inputs, 0, outputs, shape.experts)
        for name, (inputs, outputs) in shape.expert_matrices.items()
    ]


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
        text = text_model(model)
        inner, config = text.module, text.config
        family = FAMILIES[config.model_type]
        settings, epsilon = Settings.of(config, family), config.rms_norm_eps
        self.longest = longest
        self.dtype = dtype
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
            kind: _attention_config(inner.rotary_emb, kind, family, shape, settings, dtype, longest, weight.device)
            for kind in dict.fromkeys(settings.kinds)
        }
        self._sharded = sharded(model)
        self._layers = [
            Layer(layer, family, settings, configs[kind], dtype, epsilon, keeps_base)
            for layer, kind in zip(inner.layers, settings.kinds, strict=True)
        ]

    @property
    def experts(self) -> dict[int, Experts]:
        """Experts of the layers that have them, by the layer's number."""
        return {index: layer.mlp for index, layer in enumerate(self._layers) if isinstance(layer.mlp, Experts)}

    def train(self, inputs: PassInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a forward and a backward pass, and add to the gradients of the adapters.

        Returns:
            (T,) losses and (T,) hits, as from `Ops.cross_entropy`.
        """
        with self._passing(trains=True) as visit:
            return self._train(inputs, visit)

    def _train(self, inputs: PassInputs, visit: Callable[[int], None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute `train`; `visit` gathers the layer at a position of the pass (`shard.gatherer`)."""
        ops, layers = inputs.ops, list(zip(self._layers, self._groups(inputs.adapters), strict=True))
        residual, delta = self._embed(inputs), None
        passes: list[Any] = []  # for each layer its saved activations, or its input where it is computed again
        for index, (layer, groups) in enumerate(layers):
            visit(index)
            layer_input = (residual, delta)
            saves = inputs.recompute != "layers"
            residual, delta, saved = layer.forward(*layer_input, inputs, groups, saves)
            passes.append(layer_input if saved is None else saved)
        residual, normed, rstd = inputs.add_norm(residual, delta, self._norm)
        losses, hits, dnormed = ops.cross_entropy(normed, self._lm_head, inputs.batch, with_gradient=True)
        assert dnormed is not None
        dresidual = inputs.add_norm_backward(None, dnormed, residual, rstd, self._norm)
        del residual, delta, layer_input, saved, normed, dnormed  # what the backward does not need
        last = len(layers) - 1
        for index, (layer, groups) in enumerate(reversed(layers)):
            visit(last + index)
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
        with self._passing(trains=False) as visit:
            for index, (layer, groups) in enumerate(zip(self._layers, self._groups(inputs.adapters), strict=True)):
                visit(index)
                residual, delta, _ = layer.forward(residual, delta, inputs, groups, False)
        normed = inputs.add_norm(residual, delta, self._norm)[1]
        losses, hits, _ = ops.cross_entropy(normed, self._lm_head, inputs.batch, with_gradient=False)
        return losses, hits

    def new_cache(self, sequences: int, positions: int) -> list[LayerCache]:
        """Return an empty cache for each layer, for so many sequences of so many tokens."""
        return [LayerCache.empty(sequences, positions, layer.attention_config, self.dtype) for layer in self._layers]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return sum(
            2 * layer.attention_config.num_kv_heads * layer.attention_config.head_dim * self.dtype.itemsize
            for layer in self._layers
        )

    def next_tokens(self, inputs: CachedInputs, caches: Sequence[LayerCache], last: torch.Tensor) -> torch.Tensor:
        """Make a forward pass that writes keys and values into the caches, and return the likeliest next tokens.

        Args:
            inputs: of the pass.
            caches: one for each layer, from `new_cache`.
            last: (N,) int64 tokens of the flat batch after which the next one is wanted.

        Returns:
            (N,) int64 tokens; of equally likely ones the first.
        """
        residual, delta = self._embed(inputs), None
        layers = zip(self._layers, self._groups(inputs.adapters), caches, strict=True)
        with self._passing(trains=False) as visit:
            for index, (layer, groups, cache) in enumerate(layers):
                visit(index)
                residual, delta, _ = layer.forward(residual, delta, inputs.of_layer(cache), groups, False)
        normed = inputs.add_norm(residual, delta, self._norm)[1]
        head = self._lm_head
        parts = []
        for part in last.split(max(1, MAX_LOGITS // len(head.weight))):
            logits = F.linear(normed[part], head.weight).float() / head.divisor
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            parts.append(logits.argmax(-1))
        return torch.cat(parts)

    def _passing(self, trains: bool) -> AbstractContextManager[Callable[[int], None]]:
        """Make a pass over the layers; of a whole base, they are always there."""
        return nullcontext(_is_there) if self._sharded is None else self._sharded.passing(trains)

    def _embed(self, inputs: PassInputs) -> torch.Tensor:
        """Return the embeddings of the tokens, (T, H)."""
        embedded = F.embedding(inputs.batch.ids, self._embedding)
        return embedded if self._embedding_scale == 1 else embedded * self._embedding_scale

    def _groups(self, adapters: Adapters) -> list[Sequence[LayerGroup | None]]:
        """Return for each decoder layer its groups in the order of the family; None where nothing is adapted."""
        groups, per_layer = adapters.groups, len(adapters.groups) // len(self._layers)
        return [groups[at : at + per_layer] for at in range(0, len(groups), per_layer)]


def _is_there(_: int) -> None:
    """Do nothing: the layers of a whole base need not be gathered."""


def _attention_config(
    rotary_embedding: Any,
    kind: LayerKind,
    family: Family,
    shape: BaseShape,
    settings: Settings,
    dtype: torch.dtype,
    longest: int,
    device: torch.device,
) -> AttentionConfig:
    """Describe the attention of the layers of one kind.

    Args:
        rotary_embedding: of transformers. It computes the tables, unless the layers rotate nothing.
        kind: of the layers.
        family: of the base.
        shape: sizes of the base.
        settings: of the base.
        dtype: of the tables.
        longest: positions in the tables.
        device: of the tables.
    """
    if kind.is_rotated:
        positions = torch.arange(longest, device=device)[None]
        arguments = () if kind.rope is None else (kind.rope,)
        states = torch.empty(0, dtype=dtype, device=device)
        cos, sin = (table[0] for table in rotary_embedding(states, positions, *arguments))
        if family.has_half_tables:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    else:
        cos = torch.ones(longest, shape.head_size, dtype=dtype, device=device)
        sin = torch.zeros_like(cos)
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
