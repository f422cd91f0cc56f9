"""Bases whose files hold quantized weights: what their folder says is used, and told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from small_bases import rewrite, save_fp8, save_mxfp4, save_quantized, save_small_base, with_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from orchestrator.adapters.card import _load
from orchestrator.base import load_base
from orchestrator.base_folder import as_stored
from orchestrator.base_weights import dequantize_head
from orchestrator.cli import app
from orchestrator.embedded import BASE_DIR, EXPERIMENT
from orchestrator.errors import RequestError, SpecError
from orchestrator.spec import load_spec
from orchestrator.spec.sections import BaseSection

IDS = torch.arange(3, 40)[None]
LEFT_OUT = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn"]


def four_bit(**changes: Any) -> BitsAndBytesConfig:
    """The settings of a 4-bit folder, by default those of the base section."""
    settings = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return BitsAndBytesConfig(load_in_4bit=True, **(settings | changes))


STORED = {
    "as in the section": (four_bit(), []),
    "layers left out": (four_bit(llm_int8_skip_modules=LEFT_OUT), []),
    "single": (four_bit(bnb_4bit_use_double_quant=False), ["stored with base.double_quant False"]),
    "fp4": (four_bit(bnb_4bit_quant_type="fp4"), ["stored with base.quantization fp4, which is used instead of nf4"]),
    "float16": (four_bit(bnb_4bit_compute_dtype=torch.float16), ["names compute type float16"]),
    "no compute type": (four_bit(bnb_4bit_compute_dtype=None), ["names compute type float32"]),
    "packed in bfloat16": (four_bit(bnb_4bit_quant_storage=torch.bfloat16), []),
    "4-bit head": (four_bit(llm_int8_skip_modules=["nothing"]), []),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), ["stored with base.quantization int8"]),
}


def expected_logits(folder: Path, section: BaseSection) -> torch.Tensor:
    """Return what the stored values give in plain layers of the section's type."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    dtype = getattr(torch, section.compute_dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.set_submodule(name, plain)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", STORED)
def test_what_the_folder_says_is_used_and_told(kind: str, tmp_path: Path) -> None:
    settings, told = STORED[kind]
    folder = save_quantized(save_small_base("llama", tmp_path / "base"), tmp_path / "stored", settings)
    spec, notes = as_stored(load_spec(EXPERIMENT, [f"base.model={folder}", "base.compute_dtype=bfloat16"]))
    assert len(notes) == len(told) + 1
    for note, part in zip(notes, told, strict=False):
        assert part in note
    assert "cannot be merged (`export --format adapter` works)" in notes[-1]
    model = load_base(spec.base)
    adapted = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    packed = [module for module in adapted if isinstance(module, Linear4bit | Linear8bitLt)]
    assert len(packed) == (7 if kind == "layers left out" else 14)
    for module in packed:
        if isinstance(module, Linear4bit):
            assert module.compute_dtype is module.weight.quant_state.dtype is torch.bfloat16
            assert module.weight.quant_state.quant_type == spec.base.quantization
            assert module.weight.quant_state.nested is spec.base.double_quant
        else:
            assert spec.base.quantization == "int8"
    assert type(model.lm_head) is torch.nn.Linear
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert as_stored(spec)[0] == spec


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("layers left out", "bfloat16"),
        ("layers left out", "float32"),
        ("float16", "bfloat16"),
        ("4-bit head", "float32"),
    ],
)
def test_the_loaded_base_computes_the_stored_values_in_the_sections_type(kind: str, dtype: str, tmp_path: Path) -> None:
    base = save_small_base("llama", tmp_path / "base")
    folder = save_quantized(base, tmp_path / "stored", STORED[kind][0])
    section = BaseSection(model=str(folder), compute_dtype=dtype)  # type: ignore[arg-type]
    model = load_base(section)
    assert model.dtype == getattr(torch, dtype)
    with torch.no_grad():
        found = model(IDS).logits
    expected = expected_logits(folder, section)
    assert found.dtype == expected.dtype
    # Values dequantized to float16 are rounded otherwise.
    tolerance = 2e-2 if dtype == "bfloat16" else 5e-3
    assert torch.allclose(found, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_layers_left_out_by_another_name_are_those_of_the_files(family: str, tmp_path: Path) -> None:
    """transformers would take plain weights for 4-bit ones, without an error."""
    base = save_small_base(family, tmp_path / "base")
    left_out = ["lm_head", r"model.language_model.layers.0.mlp"]
    folder = save_quantized(base, tmp_path / "stored", four_bit(llm_int8_skip_modules=left_out))
    section = BaseSection(model=str(folder), compute_dtype="float32")
    with torch.no_grad():
        expected = load_base(section)(IDS).logits
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["language_model.model.layers.0.mlp", "vision_tower"]
    (folder / "config.json").write_text(json.dumps(config))
    model = load_base(section)
    plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear and "layers.0" in name}
    assert {name.rpartition(".")[2] for name in plain} >= {"gate_proj", "up_proj", "down_proj"}
    assert not any("layers.1." in name for name, module in model.named_modules() if type(module) is torch.nn.Linear)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("save", [save_mxfp4, save_fp8])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_mxfp4_and_fp8_are_dequantized_and_then_quantized_as_asked(
    save: Any, quantization: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "base")
    section = BaseSection(model=str(folder), compute_dtype="float32", quantization=quantization)  # type: ignore[arg-type]
    model = load_base(section)
    plain = load_base(section.model_copy(update={"quantization": "none"}))
    kind = {"nf4": Linear4bit, "int8": Linear8bitLt, "none": torch.nn.Linear}[quantization]
    assert type(model.model.layers[0].self_attn.q_proj) is kind
    assert bool(getattr(model, "is_loaded_in_4bit", False)) == (quantization == "nf4"), "PEFT asks for it"
    with torch.no_grad():
        expected, found = plain(IDS).logits, model(IDS).logits
    assert expected.std() > 0.01
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).median() > 0.99
    _, notes = as_stored(load_spec(EXPERIMENT, [f"base.model={folder}", f"base.quantization={quantization}"]))
    assert "it is dequantized while it is loaded" in notes[0]
    assert (", then quantized" in notes[0]) == (quantization != "none")


def test_one_scale_for_each_layer_is_dequantized_too(tmp_path: Path) -> None:
    section = BaseSection(model=str(tmp_path / "base"), compute_dtype="float32", quantization="none")
    save_small_base("mistral3", tmp_path / "base")
    with torch.no_grad():
        expected = load_base(section)(IDS).logits
    save_fp8(tmp_path / "fp8", "mistral3")
    with torch.no_grad():
        found = load_base(section.model_copy(update={"model": str(tmp_path / "fp8")}))(IDS).logits
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.99


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_layers_whose_weight_the_model_reads_are_not_quantized(quantization: Any, tmp_path: Path) -> None:
    folder = save_small_base("mamba", tmp_path / "base")
    section = BaseSection(model=str(folder), compute_dtype="float32", quantization=quantization)
    model = load_base(section)
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer.in_proj, Linear4bit | Linear8bitLt)
    assert {type(each) for each in (mixer.dt_proj, mixer.x_proj, mixer.out_proj, model.lm_head)} == {torch.nn.Linear}
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    assert "llm_int8_skip_modules=['dt_proj', 'x_proj', 'out_proj', 'lm_head']" in _load(section)
    assert _load(BaseSection(model="embedded")).count("llm_int8_skip_modules") == 0


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "hqq"])
def test_other_quantized_files_are_refused_with_what_would_help(method: str, tmp_path: Path) -> None:
    folder = rewrite(save_small_base("llama", tmp_path / "base"), lambda _: None, {"quant_method": method, "bits": 4})
    said = (
        rf"contain weights of {method}, on which adapters cannot be trained\n.*the 16-bit model that it was made from"
    )
    with pytest.raises(RequestError, match=said):
        as_stored(load_spec(EXPERIMENT, [f"base.model={folder}"]))
    with pytest.raises(RequestError, match=said):
        load_base(BaseSection(model=str(folder)))
    checked = CliRunner().invoke(app, ["check", str(EXPERIMENT), "--set", f"base.model={folder}"])
    assert isinstance(checked.exception, RequestError)


def test_a_dequantized_head_keeps_the_hook_of_its_device() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    packed = Linear4bit(model.config.hidden_size, model.config.vocab_size, bias=False)
    model.set_output_embeddings(packed.to("cpu"))
    hook = ModelHook()
    add_hook_to_module(packed, hook)
    dequantize_head(model, torch.float32)
    assert type(model.lm_head) is torch.nn.Linear
    assert vars(model.lm_head)["_hf_hook"] is hook


def test_check_prints_the_stored_fields_and_the_notes(tmp_path: Path) -> None:
    base = save_small_base("llama", tmp_path / "base")
    folder = save_quantized(base, tmp_path / "stored", four_bit(bnb_4bit_use_double_quant=False))
    call = ["check", str(EXPERIMENT), "--set", f"base.model={folder}"]
    printed = CliRunner().invoke(app, call)
    assert printed.exit_code == 0, printed.output
    assert "double_quant: false" in printed.stdout
    assert "# note: base.model" in printed.stdout
    assert json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)["base"]["double_quant"] is False


def test_a_search_over_what_is_stored_is_refused(tmp_path: Path) -> None:
    folder = save_quantized(save_small_base("llama", tmp_path / "base"), tmp_path / "stored", four_bit())
    spec = load_spec(
        EXPERIMENT, [f"base.model={folder}", "search.space={base.quantization: {choice: [nf4, fp4]}}", "search.tied={}"]
    )
    with pytest.raises(SpecError, match=r"search: base\.quantization cannot vary"):
        as_stored(spec)


def test_a_setting_that_the_stored_weights_do_not_allow_is_refused(tmp_path: Path) -> None:
    folder = save_quantized(save_small_base("llama", tmp_path / "base"), tmp_path / "stored", four_bit())
    spec = load_spec(EXPERIMENT, [f"base.model={folder}", "base.quantization=none", "lora.init=pissa"])
    with pytest.raises(SpecError, match=r"its files contain nf4 weights: lora\.init pissa needs weights"):
        as_stored(spec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "has no class that generates text with a model of this type\n.*ForCausalLM"),
        ({"model_type": "of-tomorrow"}, "does not recognize this architecture.*\n.*A newer transformers may know it"),
        ({"model_type": "llama"}, "no file named model.safetensors.*\n.*what transformers' `save_pretrained` writes"),
        ({}, "Unrecognized model.*\n.*what transformers' `save_pretrained` writes"),
    ],
)
def test_a_base_that_cannot_be_loaded_gets_a_remedy_that_helps(
    config: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message):
        load_base(BaseSection(model=str(tmp_path)))


@pytest.mark.parametrize("kind", ["llama in 4 bits", "llama", "fp8", "mistral3"])
def test_the_cards_code_loads_an_adapter_on_such_a_base(kind: str, tmp_path: Path) -> None:
    base = save_small_base("mistral3" if kind == "mistral3" else "llama", tmp_path / "base")
    if kind == "llama in 4 bits":
        base = save_quantized(base, tmp_path / "stored", four_bit(bnb_4bit_use_double_quant=False))
    elif kind == "fp8":
        base = save_fp8(tmp_path / "stored")
    quantization: Any = "none" if kind == "fp8" else "nf4"
    section = BaseSection(
        model=str(base), compute_dtype="bfloat16", quantization=quantization, double_quant=kind != "llama in 4 bits"
    )
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(section), config)
    model.save_pretrained(tmp_path / "adapter")
    with_tokenizer(tmp_path / "adapter")
    code = _load(section).replace("ID_OR_FOLDER", str(tmp_path / "adapter")).replace("BASE_FOLDER", str(base))
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
