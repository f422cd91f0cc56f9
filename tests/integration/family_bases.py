"""Random bases of many families, a few thousand weights each, with the embedded tokenizer."""

from pathlib import Path
from typing import Any

_SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

MOE: dict[str, dict[str, Any]] = {
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS | _DELTA_NET | {"shared_expert_intermediate_size": 24},
    "mixtral": _LOCAL,
    "olmoe": _EXPERTS,
    "deepseek_v3": _LATENT | _ROUTED,
    "glm4_moe": _ROUTED | {"n_group": 1, "topk_group": 1},
    "granitemoe": _LOCAL,
    "gpt_oss": _LOCAL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "phimoe": _LOCAL,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "jetmoe": _LOCAL | {"kv_channels": 8, "num_key_value_heads": 2, "num_attention_heads": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 24},
    "afmoe": _EXPERTS | {"num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8},
    "doge": {"is_moe": True, "keep_window_size": 8, "num_experts": 16, "num_experts_per_tok": 2},
    "llama4_text": _LOCAL | {"intermediate_size_mlp": 48, "attention_chunk_size": 64, "num_experts_per_tok": 1},
}
"""Families with experts -> fields of their configurations, besides the shape."""

DENSE: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["attention"] * 2, "shared_intermediate_size": 48}
    | _MAMBA2,
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "jamba": {"num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
}
"""Dense bases of families that also have experts."""

MAMBA: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": _MAMBA2,
    "nemotron_h": _MAMBA2
    | {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
    }
    | {"n_groups": 1, "chunk_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}
"""Families with a layer that PEFT refuses to adapt."""

MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": 1000, "boi_token_index": 1001, "eoi_token_index": 1002},
    "llama4": {},
    "mistral3": {"image_token_index": 1000},
    "qwen2_5_vl": {"image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002},
    "qwen3_vl": {"image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002},
    "llava": {"image_token_index": 1000},
    "mllama": {"image_token_index": 1000},
}
"""Families with towers for other inputs than text."""

_TEXT: dict[str, dict[str, Any]] = {
    "llama4": MOE["llama4_text"],
    "mllama": {"cross_attention_layers": [1]},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
    "qwen3_vl": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}},
    "mistral3": {"model_type": "mistral"},
    "llava": {"model_type": "llama"},
}
_VISION_OF: dict[str, dict[str, Any]] = {
    "mllama": {"num_global_layers": 1, "attention_heads": 4, "intermediate_layers_indices": [0]},
    "qwen2_5_vl": {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    "mistral3": {"model_type": "pixtral"},
    "llava": {"model_type": "clip_vision_model"},
}


def base_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a family's small base."""
    from transformers import AutoConfig

    if family in MULTIMODAL:
        text = _SHAPE | _TEXT.get(family, {}) | changes
        vision = _VISION | _VISION_OF.get(family, {})
        return AutoConfig.for_model(family, text_config=text, vision_config=vision, **MULTIMODAL[family])
    own = next(group[family] for group in (MOE, DENSE, MAMBA) if family in group)
    return AutoConfig.for_model(family, **_SHAPE | own | changes)


def base_model(family: str, **changes: Any) -> Any:
    """Build a family's small base with random weights, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    return auto.from_config(base_config(family, **changes)).eval()


def save(model: Any, folder: Path) -> Path:
    """Write a model with the embedded tokenizer into a folder, and return the folder."""
    from orchestrator.base import load_tokenizer
    from orchestrator.spec.sections import BaseSection

    model.save_pretrained(str(folder))
    load_tokenizer(BaseSection(model="embedded")).save_pretrained(str(folder))
    return folder


def write_base(family: str, folder: Path, **changes: Any) -> Path:
    """Write a family's small base with the embedded tokenizer into a folder, and return the folder."""
    return save(base_model(family, **changes), folder)
