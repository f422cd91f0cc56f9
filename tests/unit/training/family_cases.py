"""Small bases of each family that the fast engine holds, with settings that matter: windows are shorter than rows."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

SIZES = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1, 1.2, 1.3, 1.5, 2.0, 3.0],
            "long_factor": [4.0] * 6, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64}  # fmt: skip
BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}  # fmt: skip


def config(model_type: str, **fields: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **SIZES | HEADS | {"pad_token_id": 0} | fields)


def granite4(positions: str) -> PreTrainedConfig:
    """A dense base. It says "attention", as published files do."""
    fields = {"intermediate_size": 7, "shared_intermediate_size": 48, "num_local_experts": 0, "num_experts_per_tok": 0}
    multipliers = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.4}
    return config(
        "granitemoehybrid",
        position_embedding_type=positions,
        layer_types=["attention"] * 2,
        logits_scaling=2.5,
        attention_bias=True,
        **fields | multipliers,
    )


FAMILY_CASES: dict[str, tuple[PreTrainedConfig, str]] = {
    "qwen2 with biases, a tied head and a window, nf4": (
        config("qwen2", num_key_value_heads=1, tie_word_embeddings=True, use_sliding_window=True, **WINDOW),
        "nf4",
    ),
    "mistral with wide heads and a window": (config("mistral", head_dim=32, sliding_window=5), "none"),
    "llama with all biases and scaled positions": (
        config("llama", attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
        "none",
    ),
    "ministral": (config("ministral", head_dim=16, **WINDOW), "none"),
    "ministral3": (config("ministral3", head_dim=16), "none"),
    "qwen3 with wide heads and biases, nf4": (config("qwen3", head_dim=32, attention_bias=True), "nf4"),
    "qwen3 with a window": (config("qwen3", head_dim=16, use_sliding_window=True, **WINDOW), "none"),
    "smollm3 with a layer without positions": (config("smollm3", no_rope_layers=[1, 0]), "none"),
    "phi3 with heads that are rotated in part, nf4": (
        config("phi3", sliding_window=6, rope_parameters=LONGROPE),
        "nf4",
    ),
    "gemma2": (
        config(
            "gemma2",
            head_dim=16,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
            **WINDOW,
        ),
        "none",
    ),
    "gemma3_text with two rotary embeddings, nf4": (
        config("gemma3_text", head_dim=16, query_pre_attn_scalar=20, rope_parameters=BY_LAYER, **WINDOW),
        "nf4",
    ),
    "granite with multipliers": (
        config(
            "granite", embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.4, logits_scaling=2.5
        ),
        "none",
    ),
    "granite 4, nf4": (granite4("rope"), "nf4"),
    "granite 4 without positions": (granite4("nope"), "none"),
    "gemma with one key head": (config("gemma", head_dim=32, num_key_value_heads=1), "none"),
    "olmo2": (config("olmo2"), "none"),
    "olmoe": (config("olmoe", num_experts=5, num_experts_per_tok=2), "none"),
    "mixtral with a window, nf4": (
        config("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
        "nf4",
    ),
    "qwen3_moe": (
        config("qwen3_moe", head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32),
        "none",
    ),
    "qwen3_moe with one layer without experts": (
        config(
            "qwen3_moe",
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            mlp_only_layers=[0],
        ),
        "none",
    ),
    "gpt_oss with a window, nf4": (
        config("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, **WINDOW),
        "nf4",
    ),
    "olmo3": (config("olmo3", **WINDOW), "none"),
}
"""Name -> configuration of a small base, and its quantization."""

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip

MULTIMODAL_CASES: dict[str, tuple[PreTrainedConfig, str]] = {
    "gemma3 with a vision tower, nf4": (
        AutoConfig.for_model(
            "gemma3",
            text_config=FAMILY_CASES["gemma3_text with two rotary embeddings, nf4"][0].to_dict(),
            vision_config=VISION,
            mm_tokens_per_image=4,
            pad_token_id=0,
        ),
        "nf4",
    ),
    "mistral3 with a vision tower": (
        AutoConfig.for_model(
            "mistral3",
            text_config=config("ministral3", head_dim=16).to_dict(),
            vision_config={"model_type": "pixtral", **VISION},
            pad_token_id=0,
        ),
        "none",
    ),
}
"""The same for bases with towers that text does not reach."""

LARGE: dict[str, dict[str, Any]] = {
    "qwen3 with wide heads and biases, nf4": {"head_dim": 128},
    "phi3 with heads that are rotated in part, nf4": {"hidden_size": 384},  # heads of 96
    "gemma2": {"head_dim": 256},
    "gemma3_text with two rotary embeddings, nf4": {"head_dim": 256},
    "granite 4, nf4": {"hidden_size": 256},  # heads of 64
    "gemma with one key head": {"head_dim": 256},
    "olmo3": {"hidden_size": 320},  # heads of 80
}
"""Sizes of the heads in published models."""
