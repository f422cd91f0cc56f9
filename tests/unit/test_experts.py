"""Fused experts in 4 bits: exactly the values and gradients of experts that hold the dequantized weights."""

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from family_bases import base_model, save, write_base
from peft import LoraConfig, get_peft_model
from small_bases import save_fp8, save_mxfp4, save_quantized
from transformers import BitsAndBytesConfig

from orchestrator.adapters.expert_updates import apply_by_expert
from orchestrator.base import load_base, share_modules
from orchestrator.errors import RequestError
from orchestrator.experts import (
    BY_EXPERT,
    PackedExperts,
    compute_by_expert,
    expert_matrices,
    has_packed_experts,
    pack_experts,
)
from orchestrator.spec.sections import BaseSection

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "qwen3_next", "gpt_oss", "granitemoe")
IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 4], [7, 7, 250, 31, 900, 12, 3]])


def pairs_of(family: str, **changes: Any) -> tuple[Any, Any]:
    """A base with packed experts, and one whose experts have the dequantized values, computed by transformers."""
    plain = base_model(family, **changes).requires_grad_(False)
    quantized = copy.deepcopy(plain)
    pack_experts(quantized, "nf4", True, torch.float32)
    for name, weight in expert_matrices(plain).items():
        packed = quantized.get_parameter(name)
        whole = packed.dequantized()
        assert not torch.equal(whole.mT if packed.is_transposed else whole, weight)
        weight.data = (whole.mT if packed.is_transposed else whole).contiguous()
    assert plain.config.get_text_config()._experts_implementation != BY_EXPERT
    return quantized, plain


def logits_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    logits.square().sum().backward()
    assert inputs.grad is not None
    return logits.detach(), inputs.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_compute_what_their_dequantized_values_do(family: str) -> None:
    quantized, plain = pairs_of(family)
    for found, expected in zip(logits_and_gradient(quantized), logits_and_gradient(plain), strict=True):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "changes", "is_packed"),
    [
        ("qwen3_moe", {}, True),
        ("doge", {"is_moe": False}, False),
        ("jetmoe", {}, False),
        ("llama4_text", {}, False),
    ],
)
def test_only_experts_of_a_known_form_are_packed(family: str, changes: dict[str, Any], is_packed: bool) -> None:
    model = base_model(family, **changes)
    assert not has_packed_experts(model)
    pack_experts(model, "nf4", True, torch.float32)
    assert has_packed_experts(model) == is_packed


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 48, 32), (2, 10, 7), (2, 192, 130)])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_each_matrix_is_quantized_as_bitsandbytes_quantizes_it(
    shape: tuple[int, int, int], num_parts: int, quant_type: str, double_quant: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1, 1)
    packed = PackedExperts.quantized(weight, quant_type, double_quant, num_parts=num_parts)
    settings = {"blocksize": 64, "compress_statistics": double_quant, "quant_type": quant_type}
    for number, matrix in enumerate(weight):
        # As one row: on a CPU, bitsandbytes 0.50 takes wrong scales where a row is no multiple of 64 long.
        parts = [quantize_4bit(part.reshape(-1), **settings) for part in matrix.chunk(num_parts)]
        expected = torch.cat([dequantize_4bit(*part).view(-1) for part in parts]).view(shape[1:])
        assert torch.equal(packed.expert(number), expected)
        assert (expected - matrix).norm() < 0.2 * matrix.norm()
    assert torch.equal(packed.dequantized(), torch.stack([packed.expert(number) for number in range(shape[0])]))
    assert packed.num_weights == weight.numel()
    bits = 8 * (packed.nbytes + packed.scales.nbytes) / weight.numel()
    assert bits < (4.6 if weight.numel() > 10_000 else 100)


def test_a_transposed_parameter_gives_out_and_in_features() -> None:
    weight = torch.randn(2, 64, 96)
    packed = PackedExperts.quantized(weight, "nf4", False, is_transposed=True)
    assert packed.expert(1).shape == (96, 64)
    assert torch.equal(packed.dequantized().mT, PackedExperts.quantized(weight, "nf4", False).dequantized())


def test_only_experts_with_tokens_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model("qwen3_moe", num_experts=16, num_experts_per_tok=1).requires_grad_(False)
    pack_experts(model, "nf4", True, torch.float32)
    asked: list[int] = []
    dequantize = PackedExperts.expert
    monkeypatch.setattr(PackedExperts, "expert", lambda self, number: asked.append(number) or dequantize(self, number))
    model(input_ids=IDS[:1, :3])
    assert 0 < len(asked) <= 2 * 2 * 3, "two layers, two matrices, at most three experts"


def test_no_dequantized_weight_is_kept_for_the_backward_pass() -> None:
    model = base_model("mixtral", hidden_size=64, intermediate_size=2048).requires_grad_(False)
    pack_experts(model, "nf4", True, torch.float32)
    matrix, sizes = 64 * 2048, []
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: (sizes.append(each.numel()), each)[1], lambda each: each
    ):
        model(inputs_embeds=inputs).logits.sum().backward()
    assert sizes
    assert max(sizes) < matrix


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_base_is_loaded_with_packed_experts(family: str, dtype: str, tmp_path: Path) -> None:
    """One matrix is quantized after another while the files are read."""
    base = BaseSection(model=str(write_base(family, tmp_path)), quantization="fp4", compute_dtype=dtype)
    model, plain = load_base(base), load_base(base.model_copy(update={"quantization": "none"}))
    found = expert_matrices(model)
    assert len(found) == len(expert_matrices(plain)) > 0
    for name, packed in found.items():
        assert isinstance(packed, PackedExperts)
        weight = plain.get_parameter(name)
        module = plain.get_submodule(name.rpartition(".")[0])
        parts = 2 if name.endswith("gate_up_proj") and not module.is_transposed else 1
        again = PackedExperts.quantized(weight, "fp4", base.double_quant, packed.is_transposed, parts)
        assert torch.equal(packed.data, again.data)
        assert torch.equal(packed.dequantized(), again.dequantized())
        assert packed.compute_dtype == getattr(torch, dtype)
    assert model.config.get_text_config()._experts_implementation == BY_EXPERT
    assert model.config.quantization_config.quant_method == "bitsandbytes"


@pytest.mark.parametrize("files", ["float32", "mxfp4"])
def test_no_plain_parameter_of_experts_outlives_its_quantization(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is never in memory as a whole: when a matrix is quantized, all earlier ones are packed already."""
    folder = write_base("qwen3_moe", tmp_path) if files == "float32" else save_mxfp4(tmp_path)
    base = BaseSection(model=str(folder), compute_dtype="float32")
    quantize = PackedExperts.quantized.__func__  # type: ignore[attr-defined]
    given: list[Any] = []

    def watched(cls: Any, weight: torch.Tensor, *settings: Any) -> Any:
        gc.collect()
        assert not any(earlier() is not None for earlier in given), "an earlier matrix is still in memory"
        given.append(weakref.ref(weight))
        return quantize(cls, weight, *settings)

    monkeypatch.setattr(PackedExperts, "quantized", classmethod(watched))
    model = load_base(base)
    assert len(given) == len(expert_matrices(model)) == 4


@pytest.mark.parametrize("stored", ["mxfp4", "fp8", "bitsandbytes"])
def test_experts_of_quantized_files_are_packed(stored: str, tmp_path: Path) -> None:
    if stored == "bitsandbytes":
        plain = save(base_model("qwen3_moe"), tmp_path / "plain")
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        folder = save_quantized(plain, tmp_path / "base", settings)
    else:
        folder = save_mxfp4(tmp_path / "base") if stored == "mxfp4" else save_fp8(tmp_path / "base", "qwen3_next")
    base = BaseSection(model=str(folder), compute_dtype="float32")
    model = load_base(base)
    matrices = expert_matrices(model)
    assert matrices
    assert all(isinstance(each, PackedExperts) for each in matrices.values())
    assert model.config.get_text_config()._experts_implementation == BY_EXPERT
    assert torch.isfinite(model(input_ids=IDS % 500).logits).all()
    if stored != "bitsandbytes":
        plain = load_base(base.model_copy(update={"quantization": "none"}))
        for name, packed in matrices.items():
            weight = plain.get_parameter(name)
            found = packed.dequantized().mT if packed.is_transposed else packed.dequantized()
            assert 0 < (found - weight).norm() < 0.15 * weight.norm(), name


def test_trials_share_packed_experts() -> None:
    model = base_model("qwen3_moe").requires_grad_(False)
    pack_experts(model, "nf4", True, torch.float32)
    own = share_modules(model)
    for name, packed in expert_matrices(model).items():
        assert own.get_parameter(name) is packed
    with torch.no_grad():
        assert torch.equal(own(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_plain_experts_are_computed_by_expert_too() -> None:
    model = base_model("gpt_oss").requires_grad_(False)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        compute_by_expert(model)
        assert (model(input_ids=IDS).logits - expected).abs().max() < 1e-6


def test_a_class_that_takes_no_implementation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model("mixtral")
    monkeypatch.setattr(type(model), "_can_set_experts_implementation", classmethod(lambda _: False))
    monkeypatch.setattr(type(model.model), "_can_set_experts_implementation", classmethod(lambda _: False))
    with pytest.raises(RequestError, match="MixtralForCausalLM cannot be computed from 4-bit weights"):
        pack_experts(model, "nf4", True, torch.float32)


def test_experts_that_train_are_refused() -> None:
    model = base_model("mixtral")
    compute_by_expert(model)
    with pytest.raises(NotImplementedError, match="these train"):
        model(input_ids=IDS)


def test_8_bits_leave_experts_as_they_are(tmp_path: Path) -> None:
    folder = write_base("qwen3_moe", tmp_path)
    model = load_base(BaseSection(model=str(folder), quantization="int8", compute_dtype="float32"))
    assert not any(isinstance(each, PackedExperts) for each in expert_matrices(model).values())
    assert model.config._experts_implementation != BY_EXPERT


def test_packed_experts_are_copied_and_pickled_whole() -> None:
    weight = torch.randn(3, 8, 64)
    packed = PackedExperts.quantized(weight, "nf4", True)
    module = torch.nn.Module()
    module.gate_up_proj = packed
    copied, loaded = copy.deepcopy(module).gate_up_proj, pickle.loads(pickle.dumps(packed))
    for again in (copied, loaded):
        assert type(again) is PackedExperts
        assert again.data_ptr() != packed.data_ptr()
        assert torch.equal(again.dequantized(), packed.dequantized())


def test_a_second_adapter_of_experts_is_loaded_and_chosen(tmp_path: Path) -> None:
    base, _ = pairs_of("qwen3_moe")
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"], lora_dropout=0.0)
    model = get_peft_model(base, config)
    apply_by_expert(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        first = model(input_ids=IDS).logits
        model.load_adapter(str(tmp_path), "two")
        model.set_adapter("two")
        assert torch.allclose(model(input_ids=IDS).logits, first)
        with pytest.raises(NotImplementedError, match="experts in 4 bits cannot be merged in memory"):
            model.merge_adapter()
