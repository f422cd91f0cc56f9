"""Merges that are impossible: each has a message with the tensor or the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from small_qwen import MakeAdapterRef, qwen, save_base

from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.merge import Onto, plan_merge
from orchestrator.errors import RequestError


def assert_rejected(adapter: AdapterRef, *parts: str, onto: Onto = "dequantized") -> None:
    with pytest.raises(RequestError) as caught:
        plan_merge(adapter, "bf16", onto)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("lora", [{}, {"bias": "all", "target_modules": ["q_proj"]}], ids=str)
def test_a_base_of_another_shape_is_rejected_with_the_layer_and_both_shapes(
    make_adapter: MakeAdapterRef, tmp_path: Path, lora: dict[str, Any]
) -> None:
    given = make_adapter(**lora)
    shutil.rmtree(given.base.model)
    save_base(qwen(hidden_size=32), tmp_path / "base")
    assert_rejected(given, "model.layers.0.self_attn.q_proj.weight", "(64, 64)", "(32, 32)", "base of another shape")


def test_a_bias_of_another_shape_is_rejected(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter(bias="all", target_modules=["down_proj"])
    file = given.folder / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.bias"
    save_file(load_file(file) | {name: torch.zeros(3)}, file)
    assert_rejected(given, "model.layers.0.self_attn.q_proj.bias", "(3,)", "(64,)")


@pytest.mark.parametrize(
    ("layers", "message"), [(1, "model.layers.1.self_attn.q_proj"), (3, "model.layers.2.self_attn.q_proj")]
)
def test_a_base_with_another_number_of_layers_is_rejected(
    make_adapter: MakeAdapterRef, tmp_path: Path, layers: int, message: str
) -> None:
    given = make_adapter(target_modules=["q_proj"])
    shutil.rmtree(given.base.model)
    save_base(qwen(num_hidden_layers=layers), tmp_path / "base")
    assert_rejected(given, message)


def test_a_base_without_the_target_modules_is_rejected(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter(target_modules=["q_proj"])
    path = given.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["query_key_value"]}))
    assert_rejected(given, "adapter and base do not match", "query_key_value")


def test_a_rank_that_differs_from_the_matrices_is_rejected(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter()
    path = given.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    assert_rejected(given, "self_attn.q_proj has rank 8 in adapter_config.json, but (4, 4)")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"alora_invocation_tokens": [5]}, "with ALoraLinearVariant; only plain LoRA and DoRA can be merged"),
        ({"target_modules": ["embed_tokens"]}, "adapts model.embed_tokens, a Embedding; only linear layers merge"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "q_proj.lora_B.bias"),
    ],
    ids=str,
)
def test_an_unsupported_part_is_named(make_adapter: MakeAdapterRef, lora: dict[str, Any], message: str) -> None:
    assert_rejected(make_adapter(**lora), message)


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=str)
def test_a_tied_head_cannot_be_merged(make_adapter: MakeAdapterRef, lora: dict[str, Any]) -> None:
    assert_rejected(
        make_adapter(shape={"tie_word_embeddings": True}, **lora),
        "lm_head.weight",
        "shares it between embedding and head",
    )


def test_only_lora_can_be_merged(make_adapter: MakeAdapterRef) -> None:
    given = make_adapter()
    get_peft_model(qwen(), IA3Config(task_type="CAUSAL_LM")).save_pretrained(given.folder)
    assert_rejected(given, "is an adapter of type IA3; only LoRA can be merged")


def test_each_fault_of_a_base_has_its_message(make_adapter: MakeAdapterRef, tmp_path: Path) -> None:
    given = make_adapter()
    base = Path(given.base.model)
    shard = next(base.glob("model-00002*"))
    shard.rename(tmp_path / "shard")
    assert_rejected(given, f"{shard.name} cannot be found", "must be on this disk")
    (tmp_path / "shard").rename(shard)
    index = base / "model.safetensors.index.json"
    whole = index.read_text()
    name = "model.layers.1.mlp.up_proj.weight"
    index.write_text(whole.replace(name, "transformer.h.1.up.weight"))
    assert_rejected(given, f"contains no weight named {name}")
    index.unlink()
    assert_rejected(given, "has no safetensors", "save_pretrained")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert_rejected(given, "quantized weights (gptq)", "the 16-bit model that it was made from")
    (base / "config.json").unlink()
    assert_rejected(given, "no model in this folder")
