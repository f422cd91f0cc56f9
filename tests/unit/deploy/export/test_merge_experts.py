"""Merging onto bases with fused experts: the values as in training, and updates of the experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_bases import base_model, save
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator.base import load_base
from orchestrator.base_folder import INDEX, WEIGHTS
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.merge import Onto, plan_merge
from orchestrator.deploy.load import attach_adapter
from orchestrator.errors import RequestError
from orchestrator.experts import PackedExperts
from orchestrator.spec.sections import BaseSection

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe")
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def saved(family: str, folder: Path, parameters: list[str]) -> AdapterRef:
    """Save a small base in bfloat16 values and an adapter for it, made by PEFT."""
    model = base_model(family)
    for parameter in model.parameters():
        parameter.data = (5 * parameter.data).bfloat16().float()
    save(model, folder / "base")
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["o_proj"], target_parameters=parameters, init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return AdapterRef(
        "a", folder / "adapter", BaseSection(model=str(folder / "base"), compute_dtype="float32"), None, None
    )


def plain_base(base: BaseSection, onto: Onto) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(base.model, dtype=torch.float32)
    if onto == "dequantized":
        loaded = load_base(base)
        for name, module in loaded.named_modules():
            if isinstance(module, torch.nn.Linear):
                plain.get_submodule(name).weight.data = dequantize_module_weight(module)
        for name, parameter in loaded.named_parameters():
            if isinstance(parameter, PackedExperts):
                whole = parameter.dequantized()
                plain.get_parameter(name).data = whole.mT if parameter.is_transposed else whole
    return plain


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("parameters", [[], PARAMETERS], ids=["frozen", "adapted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_has_the_weights_of_pefts_merge(family: str, parameters: list[str], onto: Onto, tmp_path: Path) -> None:
    adapter = saved(family, tmp_path, parameters)
    expected = PeftModel.from_pretrained(plain_base(adapter.base, onto), adapter.folder).merge_and_unload()
    (tmp_path / "merged").mkdir()
    plan_merge(adapter, "bf16", onto).write(tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for name, weight in expected.bfloat16().named_parameters():
        # Summed in float32 in another order, so a sum may be rounded to the other side.
        assert torch.allclose(found.get_parameter(name), weight, rtol=2**-7, atol=1e-6), name
        assert (found.get_parameter(name) != weight).float().mean() < 0.01, name


def test_the_adapter_on_its_4_bit_base_has_the_logits_of_the_merge(tmp_path: Path) -> None:
    adapter = saved("qwen3_moe", tmp_path, PARAMETERS)
    ids = torch.tensor([[5, 17, 300, 42, 8]])
    model = attach_adapter(load_base(adapter.base), adapter)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain_base(adapter.base, "dequantized"), adapter.folder)(input_ids=ids)
        found = model(input_ids=ids).logits
        assert (found - expected.logits).abs().max() <= 1e-5 * expected.logits.abs().max()
        peft = PeftModel.from_pretrained(plain_base(adapter.base, "dequantized"), adapter.folder)
        answers = [each.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for each in (model, peft)]
        assert torch.equal(*answers)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - found).abs().max() > 1e-2


def test_experts_in_an_unknown_form_are_refused(tmp_path: Path) -> None:
    adapter = saved("qwen3_moe", tmp_path, PARAMETERS)
    file = tmp_path / "base" / WEIGHTS
    assert not (tmp_path / "base" / INDEX).exists()
    weights = {name: tensor for name, tensor in load_file(file).items() if ".experts.3." not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RequestError, match="in a form that cannot be merged"):
        plan_merge(adapter, "bf16", "dequantized")


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    adapter = saved("qwen3_moe", tmp_path, PARAMETERS)
    file = adapter.folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))
    with pytest.raises(RequestError, match=r"has rank 3 in adapter_config.json"):
        plan_merge(adapter, "bf16", "original")
