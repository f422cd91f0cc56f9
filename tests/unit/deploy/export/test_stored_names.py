"""Merging onto bases whose files name their weights differently than the model does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from small_bases import save_small_base
from small_qwen import BF16, FP32, assert_same, weights
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from orchestrator.base import load_base
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.base_files import find_base_files
from orchestrator.deploy.export.merge import Onto, plan_merge
from orchestrator.deploy.scoring.forms import open_form
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection

LANGUAGE_LAYERS = r".*layers\.\d+\.(self_attn|mlp|linear_attn)\.(q_proj|o_proj|down_proj|in_proj_qkv|out_proj)"


def adapter_on(base: BaseSection, folder: Path, **changes: Any) -> AdapterRef:
    """Save a random adapter on some linear layers of the base's language model."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=LANGUAGE_LAYERS, init_lora_weights=False, task_type="CAUSAL_LM", **changes)
    get_peft_model(load_base(base), config).save_pretrained(folder, save_embedding_layers=False)
    return AdapterRef("adapter", folder, base, None, None)


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "qwen3_5_text"])
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_a_merge_equals_pefts_and_keeps_the_names_of_the_files(family: str, onto: Onto, tmp_path: Path) -> None:
    folder = save_small_base(family, tmp_path / "base")
    base = BaseSection(model=str(folder), compute_dtype=FP32)
    adapter = adapter_on(base, tmp_path / "adapter")
    target = tmp_path / "merged"
    target.mkdir()
    plan_merge(adapter, "bf16", onto).write(target)
    assert names_in(target) == names_in(folder)
    with open_form(adapter, "merged" if onto == "dequantized" else "merged-original", BF16) as form:
        expected = {name: weight.clone() for name, weight in weights(form.model).items()}
    found = AutoModelForCausalLM.from_pretrained(target)
    assert found.dtype == torch.bfloat16
    bare = weights(AutoModelForCausalLM.from_pretrained(folder))
    # What no adapter changes in a tower is copied; the form has it as in training, quantized.
    adapted = ("q_proj.weight", "out_proj.weight")
    copied = [name for name in expected if ".vision_tower." in name and not name.endswith(adapted)]
    towers = {name: bare[name].to(torch.bfloat16) for name in copied}
    assert bool(towers) == (family == "gemma3")
    assert_same(weights(found), expected | towers)
    assert sum(not torch.equal(bare[name], weight) for name, weight in expected.items()) >= 4


def test_the_merged_model_is_still_multimodal(tmp_path: Path) -> None:
    """The vision tower, which an adapter on the text model does not load, is copied, and so is its processor."""
    folder = save_small_base("qwen3_5", tmp_path / "base")
    (folder / "preprocessor_config.json").write_text("{}")
    base = BaseSection(model=str(folder), compute_dtype=FP32, quantization="none")
    target = tmp_path / "merged"
    target.mkdir()
    plan_merge(adapter_on(base, tmp_path / "adapter"), "bf16", "original").write(target)
    assert (target / "preprocessor_config.json").is_file()
    found = weights(AutoModelForImageTextToText.from_pretrained(target))
    before = weights(AutoModelForImageTextToText.from_pretrained(folder))
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert changed
    assert all(name.startswith("model.language_model.layers.") for name in changed)


def test_trained_rows_and_modules_find_their_weights(tmp_path: Path) -> None:
    folder = save_small_base("qwen3_5", tmp_path / "base")
    base = BaseSection(model=str(folder), compute_dtype=FP32, quantization="none")
    adapter = adapter_on(
        base, tmp_path / "adapter", trainable_token_indices={"embed_tokens": [3, 5]}, modules_to_save=["model.norm"]
    )
    expected = PeftModel.from_pretrained(load_base(base), adapter.folder).merge_and_unload().to(torch.bfloat16)
    target = tmp_path / "merged"
    target.mkdir()
    plan_merge(adapter, "bf16", "original").write(target)
    assert_same(weights(AutoModelForCausalLM.from_pretrained(target)), weights(expected))


def test_a_weight_that_transformers_computes_from_several_is_refused(tmp_path: Path) -> None:
    """Files with separate experts: transformers joins them while it loads."""
    folder = save_small_base("qwen3_next", tmp_path / "base")
    files = find_base_files(BaseSection(model=str(folder)))
    names = files.stored_names(files.meta_model())
    assert names.of("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"
    with pytest.raises(RequestError, match="computes some weights of this base from several others") as refused:
        names.of("model.layers.0.mlp.experts.gate_up_proj")
    assert "--format adapter" in refused.value.remedy


def test_the_index_lists_the_names_of_the_files(tmp_path: Path) -> None:
    folder = save_small_base("gemma3", tmp_path / "base")
    adapter = adapter_on(BaseSection(model=str(folder), compute_dtype=FP32), tmp_path / "adapter")
    target = tmp_path / "merged"
    target.mkdir()
    plan_merge(adapter, "bf16", "original").write(target, shard_bytes=100_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names_in(folder)
