"""Make a base of a well-known shape with random weights, to measure time and memory but not quality.

    python scripts/make_base.py 1.1b /tmp/base-1.1b --text rows.jsonl

The tokenizer is a byte-level BPE trained on the text of a JSONL file, 32,000 tokens.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizer import byte_level_bpe
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 32_000
"""Tokens of the tokenizer, and of the model unless its shape says otherwise."""


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Return the fields of a Llama configuration."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }


SHAPES: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B and Llama-2-7B.
    "1.1b": llama(2048, 5632, 22, 32, 4),
    "7b": llama(4096, 11008, 32, 32, 32),
    "llama-2-70b": llama(8192, 28672, 80, 64, 8),
    "qwen2.5-32b": llama(5120, 27648, 64, 40, 8) | {"model_type": "qwen2", "vocab_size": 152_064},
    "llama-3.1-8b": llama(4096, 14336, 32, 32, 8) | {"vocab_size": 128_256},
    "smollm2-135m": llama(576, 1536, 30, 9, 3) | {"vocab_size": 49_152, "tie_word_embeddings": True},
    "qwen3-8b": llama(4096, 12288, 36, 32, 8) | {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128},
    "phi-4": llama(5120, 17920, 40, 40, 10) | {"model_type": "phi3", "vocab_size": 100_352},
    "gemma-3-4b": llama(2560, 10240, 34, 8, 4)
    | {"model_type": "gemma3_text", "vocab_size": 262_208, "head_dim": 256, "sliding_window": 1024},
    "qwen3-30b-a3b": llama(2048, 6144, 48, 32, 4)
    | {"model_type": "qwen3_moe", "vocab_size": 151_936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 768, "norm_topk_prob": True},
    "gpt-oss-20b": llama(2880, 2880, 24, 64, 8)
    | {"model_type": "gpt_oss", "vocab_size": 201_088, "head_dim": 64, "num_local_experts": 32},
    "granite-4.0-micro": llama(2560, 8192, 40, 40, 8)
    | {
        "model_type": "granitemoehybrid",
        "vocab_size": 100_352,
        "tie_word_embeddings": True,
        "shared_intermediate_size": 8192,
        "num_local_experts": 0,
        "layer_types": ["full_attention"] * 40,
        "position_embedding_type": "rope",
        "mamba_n_heads": 80,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 1 / 64,
        "logits_scaling": 10.0,
    },
    # A tiny one to try scripts with, and one for measurements that depend only on the number of layers.
    "tiny": llama(64, 128, 1, 2, 1),
    "thin": llama(64, 128, 22, 2, 1),
}
"""Name -> `model_type` and fields of the configuration of transformers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers; by default as many as the shape has")
    parser.add_argument("--text", type=Path, required=True, help="JSONL file on whose strings the tokenizer is trained")
    arguments = parser.parse_args()
    tokenizer = byte_level_bpe(strings_of(arguments.text), VOCABULARY)
    fields = dict(SHAPES[arguments.shape])
    fields["num_hidden_layers"] = arguments.layers or fields["num_hidden_layers"]
    config = AutoConfig.for_model(
        fields.pop("model_type"),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: {model.num_parameters():,} random parameters, {len(tokenizer):,} tokens")


def strings_of(file: Path) -> Iterator[str]:
    """Yield every string value of a JSONL file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        yield from (value for value in json.loads(line).values() if isinstance(value, str))


if __name__ == "__main__":
    main()
