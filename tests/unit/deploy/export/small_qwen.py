"""A small Qwen2 as a base, adapters for it, and their merge; the commit of a base on the hub."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.dtypes import Dtype
from orchestrator.deploy.export.merge import Onto, plan_merge
from orchestrator.embedded import BASE_DIR

BF16 = "bfloat16"


FP32 = "float32"


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""Commit of `someone/small` on the hub, see the fixture `hub`."""


MakeAdapterRef = Callable[..., AdapterRef]


def qwen(**changes: Any) -> Qwen2ForCausalLM:
    """Make a random Qwen2 with two layers, biases and an untied head."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def save_base(model: Any, folder: Path, dtype: str = BF16, max_shard_size: str = "60KB") -> Path:
    """Save a model as a base in several shards, with the tokenizer of the embedded base."""
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER:
        shutil.copyfile(BASE_DIR / name, folder / name)
    return folder


def save_adapter(model: Any, folder: Path, **settings: Any) -> Path:
    """Save a random adapter of the model. Trained biases and fully trained modules are random too."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(config | settings)))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(folder, save_embedding_layers=False)  # as in `Adapter.of`
    return folder


def merged(adapter: AdapterRef, folder: Path, dtype: Dtype = "bf16", onto: Onto = "dequantized", **how: Any) -> Any:
    """Write the merged model and load it with transformers."""
    folder.mkdir()
    plan_merge(adapter, dtype, onto).write(folder, **how)
    return AutoModelForCausalLM.from_pretrained(folder)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
