"""Sizes of a base, read from its configuration."""

from dataclasses import dataclass
from typing import Any

from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.family import GROUPS


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a base whose layers have an attention and a gated MLP."""

    hidden: int
    inner: int
    """Features between the MLP's layers."""
    layers: int
    queries: int
    """Number of query heads."""
    keys: int
    """Number of key heads, which is also the number of value heads."""
    head_size: int
    vocabulary: int
    tied: bool
    """Whether the LM head shares the embedding's weight."""
    groups: tuple[tuple[str, ...], ...] = GROUPS
    """The family's groups of linear layers."""
    norms_before: int = 2
    """Norms before attention and MLP in a layer."""
    norms_after: int = 0
    """Norms after attention and MLP in a layer."""
    qk_norms: int = 0
    """Norms of the queries and keys of one token in a layer."""
    experts: int = 0
    """Experts in a layer, in place of the MLP; 0 where there are none."""
    experts_per_token: int = 0
    expert_inner: int = 0
    """Features between the layers of an expert."""

    @classmethod
    def of(cls, config: Any) -> "BaseShape":
        """Read a transformers configuration of a supported family."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        family = FAMILIES[config.model_type]
        norms, heads = family.norms, config.num_attention_heads + config.num_key_value_heads
        return cls(
            config.hidden_size,
            getattr(config, family.inner_field),
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            size,
            config.vocab_size,
            config.tie_word_embeddings,
            groups=family.groups if family.experts is None else tuple(filter(None, family.groups_beside_experts)),
            norms_before=sum(name is not None for name in (norms.before_attention, norms.before_mlp)),
            norms_after=sum(name is not None for name in (norms.after_attention, norms.after_mlp)),
            qk_norms=0 if family.qk_norms is None else 2 if family.normalizes_all_heads else heads,
            **({} if family.experts is None else _experts(config)),
        )

    @property
    def qkv(self) -> int:
        """Features of queries, keys and values together."""
        return (self.queries + 2 * self.keys) * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer that may have adapters: name -> (in features, out features).

        In a family with experts those of an MLP have none: PEFT 0.21 takes them for experts because of their names.
        """
        attended, keys = self.queries * self.head_size, self.keys * self.head_size
        sizes = (
            (self.hidden, (attended, keys, keys)),
            (attended, (self.hidden,)),
            (self.hidden, (self.inner, self.inner)),
            (self.inner, (self.hidden,)),
        )
        linears: dict[str, tuple[int, int]] = {}
        for group, (inputs, outputs) in zip(self.groups, sizes, strict=False):
            of_layers = outputs if len(group) == len(outputs) else (sum(outputs),)  # otherwise one fused layer
            linears |= {name.rpartition(".")[2]: (inputs, size) for name, size in zip(group, of_layers, strict=True)}
        return linears

    @property
    def expert_matrices(self) -> dict[str, tuple[int, int]]:
        """Matrices of one expert that may have adapters: last two parts of the parameter's name -> (in, out features).

        Their order is that in which a layer uses them.
        """
        gate_up, down = (self.hidden, 2 * self.expert_inner), (self.expert_inner, self.hidden)
        return {"experts.gate_up_proj": gate_up, "experts.down_proj": down} if self.experts else {}

    def adapted_features(self, name: str) -> int:
        """Return the in and out features of a layer that has an adapter, together; of experts those of all of them.

        Args:
            name: from `linears` or `expert_matrices`.
        """
        if name in self.expert_matrices:
            return self.experts * sum(self.expert_matrices[name])
        return sum(self.linears[name])

    @property
    def mlp_features(self) -> int:
        """Features of a token between the layers of its MLP, or of all its experts."""
        return self.experts_per_token * self.expert_inner if self.experts else self.inner

    @property
    def used_share(self) -> float:
        """Share of the weights of linear layers and experts that a token uses."""
        used = self.layers * (self.hidden * self.qkv + self.queries * self.head_size * self.hidden)
        return (used + self.layers * 3 * self.hidden * self.mlp_features) / self.num_linear_weights

    @property
    def num_linear_weights(self) -> int:
        """Number of weights in the linear layers and the experts of all decoder layers."""
        attention = self.hidden * self.qkv + self.queries * self.head_size * self.hidden
        inner = self.experts * self.expert_inner if self.experts else self.inner
        return self.layers * (attention + 3 * self.hidden * inner)


def adapted_part(name: str) -> str:
    """Return the part of the full name of an adapted layer or parameter of experts that `BaseShape` lists."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-2:-1] == ["experts"] else parts[-1]


def _experts(config: Any) -> dict[str, int]:
    """Return the fields of `BaseShape` that describe experts, which all layers are taken to have."""
    return {
        "experts": getattr(config, "num_local_experts", None) or config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_inner": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
    }
