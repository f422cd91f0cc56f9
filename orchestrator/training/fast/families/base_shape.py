"""Sizes of a Llama-like base, read from its configuration."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a Llama-like base."""

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

    @classmethod
    def of(cls, config: Any) -> "BaseShape":
        """Read a transformers configuration."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            size,
            config.vocab_size,
            config.tie_word_embeddings,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: name -> (in features, out features)."""
        attended = self.queries * self.head_size
        return {
            "q_proj": (self.hidden, attended),
            "k_proj": (self.hidden, self.keys * self.head_size),
            "v_proj": (self.hidden, self.keys * self.head_size),
            "o_proj": (attended, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def num_linear_weights(self) -> int:
        """Number of weights in the linear layers of all decoder layers."""
        return self.layers * sum(i * o for i, o in self.linears.values())
