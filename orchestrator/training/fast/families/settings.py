"""What a base's configuration says about its computation, beside sizes: windows, positions, scales and caps."""

from dataclasses import dataclass
from typing import Any

from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.families.family import Family

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Values of `layer_types` that the decoder computes."""


@dataclass(frozen=True)
class LayerKind:
    """How a decoder layer attends. Layers of one kind share tables and compiled kernels."""

    window: int | None = None
    """Number of the latest tokens that a token sees, itself included; None where it sees all."""
    rope: str | None = None
    """Argument `layer_type` of the model's rotary embedding; None where it takes none."""
    is_rotated: bool = True
    """Whether queries and keys are rotated (RoPE)."""


@dataclass(frozen=True)
class Settings:
    """The settings of a decoder. Fields that a family does not have are at values that change nothing."""

    kinds: tuple[LayerKind, ...]
    """The kind of each layer."""
    attention_scale: float
    """Factor of the products of queries and keys."""
    attention_softcap: float | None
    embedding_scale: float
    residual_scale: float
    """Factor of what attention and MLP add to the residual stream."""
    logits_divisor: float
    logits_softcap: float | None
    experts_per_token: int = 0
    normalizes_scores: bool = True
    """Whether the scores of a token's experts are divided by their sum."""

    @classmethod
    def of(cls, config: Any, family: Family) -> "Settings":
        """Read a transformers configuration. Eligibility has refused fields that the family does not list."""
        query_scalar = getattr(config, "query_pre_attn_scalar", None) or BaseShape.of(config).head_size
        embedding_scale = config.hidden_size**0.5 if family.scales_embedding else 1.0
        return cls(
            layer_kinds(config),
            getattr(config, "attention_multiplier", None) or query_scalar**-0.5,
            getattr(config, "attn_logit_softcapping", None),
            getattr(config, "embedding_multiplier", embedding_scale),
            getattr(config, "residual_multiplier", 1.0),
            getattr(config, "logits_scaling", 1.0),
            getattr(config, "final_logit_softcapping", None),
            getattr(config, "num_experts_per_tok", 0),
            getattr(config, "norm_topk_prob", True),
        )


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """Return the kind of each layer of a transformers configuration."""
    count, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is not None:
        windows = [window if "sliding" in each else None for each in types]
    else:
        windows = [window if getattr(config, "use_sliding_window", True) else None] * count
    ropes = types if types and _ropes_by_layer(config) else [None] * count
    # It may be longer than there are layers.
    rotated = [bool(each) for each in getattr(config, "no_rope_layers", None) or [True] * count][:count]
    if not FAMILIES[config.model_type].rotates(config):
        rotated = [False] * count
    return tuple(LayerKind(*each) for each in zip(windows, ropes, rotated, strict=True))


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of each rotary embedding of a base: one, or one for each type of layer."""
    return _ropes_by_layer(config) or [config.rope_parameters]


def _ropes_by_layer(config: Any) -> list[dict[str, Any]]:
    """Return the parameters for each type of layer, which may lie beside those of one for all; empty without types."""
    return [each for each in config.rope_parameters.values() if isinstance(each, dict)]
