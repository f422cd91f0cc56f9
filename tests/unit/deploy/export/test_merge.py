"""Merging: every weight equals, to the bit, the one that loading and PEFT give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from small_qwen import BF16, FP32, MakeAdapterRef, assert_same, merged, qwen, save_adapter, save_base, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.base import load_base
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.dtypes import DTYPES, Dtype
from orchestrator.deploy.export.merge import Merge, Onto, plan_merge
from orchestrator.spec.sections import BaseSection


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "base_fields",
    [
        {"compute_dtype": BF16},
        {"compute_dtype": FP32, "double_quant": False},
        {"compute_dtype": "float16", "quantization": "fp4"},
        {"compute_dtype": BF16, "quantization": "none"},
        {"compute_dtype": BF16, "quantization": "int8"},
    ],
    ids=str,
)
def test_the_base_weights_equal_those_in_training_to_the_bit(
    make_adapter: MakeAdapterRef, tmp_path: Path, base_fields: dict[str, Any], tied: bool
) -> None:
    given = make_adapter(
        base_dtype=FP32, shape={"tie_word_embeddings": tied}, base_fields=base_fields, target_modules=["q_proj"]
    )
    loaded = load_base(given.base)
    expected = {name: parameter for name, parameter in loaded.named_parameters() if ".q_proj." not in name}
    packed = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    assert len(packed) == (0 if given.base.quantization == "none" else 2 * 7), "all linear layers but the head"
    for name in packed:
        expected |= {f"{name}.weight": dequantize_module_weight(loaded.get_submodule(name))}
    found = weights(merged(given, tmp_path / "merged", "fp16" if base_fields["compute_dtype"] == "float16" else "bf16"))
    for name in expected.keys() - {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}:
        assert torch.equal(expected[name].to(found[name].dtype), found[name]), name
    assert plan_merge(given, "bf16", "original").quantized is None
    assert {f"{name}.weight" for name in packed} == set(plan_merge(given, "bf16", "dequantized").quantized or ())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 7}},
        {"bias": "all", "modules_to_save": ["lm_head"]},
        {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["norm"]},
        {"trainable_token_indices": {"embed_tokens": [3, 500], "lm_head": [3, 500]}, "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_a_merge_equals_pefts_merge_in_float32_to_the_bit(
    make_adapter: MakeAdapterRef, tmp_path: Path, lora: dict[str, Any], onto: Onto, dtype: Dtype
) -> None:
    given = make_adapter(**lora)
    plain = qwen().to(torch.bfloat16).float()  # the values in the files
    if onto == "dequantized":
        for name, layer in load_base(given.base).named_modules():
            if isinstance(layer, Linear4bit):
                plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = PeftModel.from_pretrained(plain, given.folder).merge_and_unload()
    bare = qwen().to(getattr(torch, DTYPES[dtype]))
    expected.to(getattr(torch, DTYPES[dtype]))
    assert any(not torch.equal(weights(bare)[name], weight) for name, weight in weights(expected).items())
    assert_same(weights(merged(given, tmp_path / "merged", dtype, onto)), weights(expected))


def test_a_weight_that_does_not_fit_on_the_gpu_is_merged_on_the_cpu(
    make_adapter: MakeAdapterRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, devices = make_adapter(base_fields={"quantization": "none"}), list[str]()
    expected = weights(merged(given, tmp_path / "expected"))
    compute = Merge._compute

    def compute_with_full_gpu(merge: Merge, name: str, device: str) -> Any:
        devices.append(device)
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.20 GiB.")
        return compute(merge, name, device)

    monkeypatch.setattr(Merge, "_compute", compute_with_full_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: devices.append("emptied"))
    (tmp_path / "merged").mkdir()
    plan_merge(given, "bf16", "dequantized").write(tmp_path / "merged")
    monkeypatch.undo()
    assert devices.count("cuda") == devices.count("emptied") == devices.count("cpu") > 0
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_other_errors_of_the_gpu_are_raised(make_adapter: MakeAdapterRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Merge, name: str, device: str) -> None:
        if device == "cuda":
            raise RuntimeError(f"{name}: CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Merge, "_compute", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        plan_merge(make_adapter(), "bf16", "dequantized").value("lm_head.weight")


def test_a_merged_model_contains_new_tokens(tmp_path: Path) -> None:
    """Embedding and head share their weight, and the rows of the new tokens are the trained ones."""
    base = save_base(qwen(tie_word_embeddings=True), tmp_path / "base", FP32)
    section = BaseSection(model=str(base), compute_dtype=FP32, quantization="none", new_tokens=("<|a|>", "<|b|>"))
    ids = [512, 513]
    tokens = {"trainable_token_indices": {"embed_tokens": ids}, "target_modules": ["q_proj"]}
    adapter = save_adapter(load_base(section), tmp_path / "adapter", **tokens)
    found = merged(AdapterRef("adapter", adapter, section, None, None), tmp_path / "merged", "fp16")
    expected = PeftModel.from_pretrained(load_base(section), adapter).merge_and_unload()
    assert found.config.vocab_size == 514
    assert found.get_input_embeddings().weight.shape == (514, 64)
    assert found.lm_head.weight is found.get_input_embeddings().weight
    assert torch.equal(found.get_input_embeddings().weight, expected.get_input_embeddings().weight.half())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("<|b|>", add_special_tokens=False).input_ids == [513]
