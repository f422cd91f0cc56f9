"""The keys and values of earlier tokens, so that generation computes each token once.

The cache of a layer is a rectangle (sequences, positions, key heads, D). A pass over prompts fills it; each later pass
holds one token of each sequence, which attends to the row of its sequence. Plain PyTorch serves both devices: a pass of
so few tokens waits for the weights, not for the attention.
"""

from dataclasses import dataclass, replace

import torch

from orchestrator.training.fast.ops.protocol import AttentionConfig
from orchestrator.training.fast.ops.reference import attend_to, rotate
from orchestrator.training.fast.step.pass_inputs import PassInputs


@dataclass(frozen=True)
class LayerCache:
    """Rotated keys, and values, of the sequences in one layer."""

    keys: torch.Tensor
    """(sequences, positions, key heads, D)."""
    values: torch.Tensor
    """The same shape."""

    @classmethod
    def empty(cls, sequences: int, positions: int, config: AttentionConfig, dtype: torch.dtype) -> "LayerCache":
        """Return a cache with room for so many sequences of so many tokens, filled with zeros."""
        shape = sequences, positions, config.num_kv_heads, config.head_dim
        return cls(*(torch.zeros(shape, dtype=dtype, device=config.cos.device) for _ in range(2)))

    def kept(self, sequences: torch.Tensor) -> "LayerCache":
        """Return the cache of these sequences alone, (N,) int64, in this order."""
        return LayerCache(self.keys[sequences], self.values[sequences])


@dataclass(frozen=True)
class CachePlaces:
    """Where the tokens of a flat batch belong in the cache. N tokens; padding is not among them."""

    tokens: torch.Tensor
    """(N,) int64 index in the flat batch."""
    sequences: torch.Tensor
    """(N,) int64 row of the cache."""
    positions: torch.Tensor
    """(N,) int64 position within the sequence."""


@dataclass(frozen=True)
class CachedInputs(PassInputs):
    """Inputs of a pass that writes keys and values into a cache."""

    places: CachePlaces
    reads_cache: bool
    """Whether each token is the last of its sequence, one for each row of the cache in the rows' order, and attends to
    that row. Otherwise sequences are whole, and attend to themselves."""
    length: int
    """Upper bound of the tokens of a sequence, the new one included."""
    cache: LayerCache | None = None
    """Cache of the layer that is computed."""

    def of_layer(self, cache: LayerCache) -> "CachedInputs":
        """Return the same inputs with the cache of a layer."""
        return replace(self, cache=cache)

    def attention(
        self, qkv: torch.Tensor, config: AttentionConfig, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Store keys and values, then attend. Nothing is saved for a backward."""
        assert self.cache is not None
        places = self.places
        heads = qkv[places.tokens].unflatten(1, (-1, config.head_dim))
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
        cos, sin = config.cos[places.positions][:, None], config.sin[places.positions][:, None]
        self.cache.keys[places.sequences, places.positions] = rotate(k, cos, sin)
        self.cache.values[places.sequences, places.positions] = v
        if not self.reads_cache:
            return self.ops.attention(qkv, self.batch, config, sinks)[0], ()
        output = qkv.new_zeros(len(qkv), config.num_heads * config.head_dim)
        output[places.tokens] = self._attend(rotate(q, cos, sin), self.cache, config, sinks)
        return output, ()

    def _attend(
        self, q: torch.Tensor, cache: LayerCache, config: AttentionConfig, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend from one token of each sequence, (N, num_heads, D), to the tokens before it: (N, num_heads * D).

        The query heads that share a key head take the place of the queries, so that no key is copied.
        """
        grouped = q.unflatten(1, (config.num_kv_heads, -1))
        k, v = (part[:, : self.length].transpose(1, 2) for part in (cache.keys, cache.values))
        distance = self.places.positions[:, None] - torch.arange(self.length, device=q.device)
        visible = (distance >= 0) & (distance < (config.window or self.length))
        logits = None if sinks is None else sinks.view(config.num_kv_heads, -1, 1)
        return attend_to(grouped, k, v, visible[:, None, None], config, logits).flatten(1)
