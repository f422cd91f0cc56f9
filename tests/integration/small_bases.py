"""Random bases of two layers, of families whose files or layers differ from Llama's, each saved with a tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestrator.embedded import BASE_DIR

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_TEXT = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_QWEN_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "depth": 1, "out_hidden_size": 64,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
_IMAGE_TOKENS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _TEXT),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 32},
            "vision_config": _VISION | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14,
                                        "vision_use_head": False},
            "mm_tokens_per_image": 4, "image_token_index": 500, "boi_token_index": 502, "eoi_token_index": 503,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": _TEXT | {"model_type": "mistral"},
            "vision_config": _VISION | {"num_hidden_layers": 1, "head_dim": 16, "image_size": 28, "patch_size": 14},
            "image_token_index": 500,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5],
                                                        "mrope_interleaved": True, "rope_theta": 1e4}},
            "vision_config": _QWEN_VISION, **_IMAGE_TOKENS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": _TEXT | _LINEAR, "vision_config": _QWEN_VISION, **_IMAGE_TOKENS},
    ),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", _TEXT | _LINEAR),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _TEXT | _LINEAR | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                           "shared_expert_intermediate_size": 32},
    ),
    "mamba": ("MambaForCausalLM", {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8,
                                   "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}),
    "gpt_oss": ("GptOssForCausalLM", _TEXT | _EXPERTS | {"sliding_window": 16}),
}  # fmt: skip


def small_model(family: str, **changes: Any) -> Any:
    """Make a random model of a family, with weights large enough to matter."""
    import transformers

    name, settings = _CONFIGS[family]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def save_small_base(family: str, folder: Path, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Save a random base of a family, in several shards, with the tokenizer of the embedded base."""
    small_model(family, **changes).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB")
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """Copy the tokenizer of the embedded base into a folder."""
    for name in TOKENIZER:
        shutil.copyfile(BASE_DIR / name, folder / name)
    return folder


def save_quantized(base: Path, folder: Path, quantization_config: Any) -> Path:
    """Quantize a base while it is loaded, and save it so."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    is_multimodal = hasattr(AutoConfig.from_pretrained(base), "vision_config")
    kind = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    kind.from_pretrained(base, quantization_config=quantization_config, dtype=torch.bfloat16).save_pretrained(folder)
    return with_tokenizer(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], quantization: dict[str, Any]) -> Path:
    """Change the tensors of a saved base, and say in its configuration how they are quantized.

    Args:
        folder: the base.
        change: changes the tensors, by their names in the files.
        quantization: the new `quantization_config`.
    """
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_mxfp4(folder: Path) -> Path:
    """Save a random gpt-oss whose experts are stored in MXFP4, as on the hub."""

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full(shape, 124, dtype=torch.uint8)  # 2 ** -3

    return rewrite(save_small_base("gpt_oss", folder), pack, {"quant_method": "mxfp4"})


def save_fp8(folder: Path, family: str = "llama") -> Path:
    """Save a random base whose linear layers are stored in FP8.

    Llama's layers have a scale for each block, as DeepSeek's have; other families one scale a layer, as Ministral has.
    """
    by_block = family == "llama"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj." in name and "vision" not in name]:
            scale = tensors[name].float().abs().max() / 448
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1) if by_block else scale
            if not by_block:
                tensors[name.replace("weight", "activation_scale")] = torch.tensor(1.0)

    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if by_block else "static",
        "weight_block_size": [128, 128] if by_block else None,
        "modules_to_not_convert": ["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    }
    return rewrite(save_small_base(family, folder), pack, settings)
