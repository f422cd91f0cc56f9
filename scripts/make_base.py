"""Make a base of a well-known shape with random weights, to measure time and memory but not quality.

    python scripts/make_base.py 1.1b /tmp/base-1.1b --text rows.jsonl

The tokenizer is a byte-level BPE trained on the text of a JSONL file. The model's vocabulary is always 32,000.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizer import byte_level_bpe
from transformers import LlamaConfig, LlamaForCausalLM

# (hidden size, MLP size, layers, heads, key-value heads): TinyLlama-1.1B, Llama-2-7B, a tiny one to try scripts with,
# and one for measurements that depend only on the number of layers.
SHAPES = {
    "1.1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 11008, 32, 32, 32),
    "tiny": (64, 128, 1, 2, 1),
    "thin": (64, 128, 22, 2, 1),
}
VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="JSONL file on whose strings the tokenizer is trained")
    arguments = parser.parse_args()
    tokenizer = byte_level_bpe(strings_of(arguments.text), VOCABULARY)
    hidden, inner, layers, heads, kv_heads = SHAPES[arguments.shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: {model.num_parameters():,} random parameters, {len(tokenizer):,} tokens")


def strings_of(file: Path) -> Iterator[str]:
    """Yield every string value of a JSONL file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        yield from (value for value in json.loads(line).values() if isinstance(value, str))


if __name__ == "__main__":
    main()
