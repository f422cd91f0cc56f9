"""A model with random weights, as the fast engine's decoder reads it, in well-known shapes."""

from types import SimpleNamespace
from typing import Any

import torch

SHAPES = {"1.1B": (2048, 5632, 22, 32, 4), "7B": (4096, 11008, 32, 32, 32)}
"""Hidden size, inner size of the MLP, layers, query heads, key heads."""

VOCABULARY = 32_000


def make_model(hidden: int, inner: int, num_layers: int, heads: int, keys: int) -> Any:
    """Make an object with what `Decoder` reads of a Hugging Face model."""
    size = hidden // heads
    narrow = keys * size

    def module(*shape: int) -> Any:
        layer = torch.nn.Linear(shape[-1], shape[0], bias=False, device="meta") if len(shape) > 1 else torch.nn.Module()
        layer.weight = torch.nn.Parameter(random(*shape) * shape[-1] ** -0.5, requires_grad=False)
        return layer

    def decoder_layer() -> Any:
        layer = torch.nn.Module()
        widths = {"q_proj": hidden, "k_proj": narrow, "v_proj": narrow, "o_proj": hidden}
        layer.self_attn = torch.nn.ModuleDict({name: module(width, hidden) for name, width in widths.items()})
        layer.mlp = torch.nn.ModuleDict(
            {"gate_proj": module(inner, hidden), "up_proj": module(inner, hidden), "down_proj": module(hidden, inner)}
        )
        layer.input_layernorm, layer.post_attention_layernorm = module(hidden), module(hidden)
        return layer

    def rotary(states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None] / 10_000 ** (torch.arange(0, size, 2, device="cuda") / size)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    config = SimpleNamespace(
        model_type="llama",
        rope_parameters={"rope_type": "default"},
        num_attention_heads=heads,
        num_key_value_heads=keys,
        hidden_size=hidden,
        head_dim=size,
        rms_norm_eps=1e-5,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    inner_model = SimpleNamespace(
        embed_tokens=module(VOCABULARY, hidden),
        layers=[decoder_layer() for _ in range(num_layers)],
        norm=module(hidden),
        rotary_emb=rotary,
    )
    head = module(VOCABULARY, hidden)
    return SimpleNamespace(model=inner_model, config=config, get_output_embeddings=lambda: head)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
