"""Which experts `lora.target_modules` adapts, with which values, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_bases import MOE, base_config, base_model
from peft import PeftModel
from transformers import AutoConfig
from typer.testing import CliRunner

from orchestrator.adapters.bundle import Adapter
from orchestrator.adapters.expert_updates import AdaptedExperts, expert_layers
from orchestrator.base import empty_model, load_tokenizer
from orchestrator.cli import app
from orchestrator.errors import RequestError, SpecError, TrialError
from orchestrator.experts import pack_experts
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.spec.sections import BaseSection, LoraSection
from orchestrator.training.engines.check_targets import EmptyBases, check_targets, notes_on_size
from orchestrator.training.model.adapter_init import init_adapter
from orchestrator.training.model.linear_layers import linear_layers
from orchestrator.training.model.peft_model import adapted_parts, load_adapter_weights, model_from_peft
from orchestrator.training.model.targets import (
    expected,
    expected_experts,
    expected_extra_trainables,
    expected_modules,
    target_warnings,
)

MakeConfig = Callable[..., TrialConfig]
IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 4]])


@pytest.fixture
def trial(document: dict[str, Any]) -> MakeConfig:
    """`trial(rank=4)`: a trial with these fields of lora."""
    base = {"model": "embedded", "quantization": "nf4", "compute_dtype": "float32"}
    lora = {"rank": 4, "dropout": 0}
    return lambda **fields: parse_spec(document | {"base": base, "lora": lora | fields}).trial_config({})


def adapted(base: Any, config: TrialConfig) -> Any:
    modules = expected_modules(base, config.lora)
    extra = expected_extra_trainables(base, config, modules, load_tokenizer(config.base))
    model = model_from_peft(base, config, modules, extra)
    init_adapter(model, config.lora, 0, torch.float32)
    return model


def packed(family: str, **changes: Any) -> Any:
    base = base_model(family, **changes).requires_grad_(False)
    pack_experts(base, "nf4", True, torch.float32)
    return base


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["experts"], ["gate_up_proj", "down_proj"]),
        (["mlp.experts"], ["gate_up_proj", "down_proj"]),
        (["experts.down_proj"], ["down_proj"]),
        (["q_proj", "mlp.experts.gate_up_proj"], ["gate_up_proj"]),
        (["model.layers.1.mlp.experts.down_proj"], ["1.mlp.experts.down_proj"]),
        (["q_proj"], []),
        ("all-linear", []),
    ],
)
def test_experts_are_adapted_if_they_are_named(targets: Any, chosen: list[str]) -> None:
    lora = LoraSection(target_modules=targets, dropout=0)
    for base in (base_model("qwen3_moe"), packed("qwen3_moe")):
        expected_modules(base, lora)
        found = expected_experts(base, lora)
        layers = ["1"] if chosen and chosen[0].startswith("1.") else ["0", "1"]
        leaves = [each.rpartition(".")[2] for each in chosen]
        assert set(found) == {f"model.layers.{i}.mlp.experts.{leaf}" for i in layers for leaf in leaves}
        shapes = {"gate_up_proj": (4, 32, 48), "down_proj": (4, 24, 32)}
        assert all(shape == shapes[name.rpartition(".")[2]] for name, shape in found.items())
    said = " ".join(target_warnings(base, lora))
    assert ("fused experts" in said) == (targets == "all-linear")


def test_down_proj_alone_means_no_experts() -> None:
    """A shared expert or a dense layer has a linear layer of that name."""
    lora = LoraSection(target_modules=["o_proj", "down_proj"], dropout=0)
    assert expected_experts(base_model("hunyuan_v1_moe"), lora) == {}


def test_transposed_experts_have_the_shapes_of_their_products() -> None:
    lora = LoraSection(target_modules=["experts"], dropout=0)
    for base in (base_model("gpt_oss"), packed("gpt_oss")):
        found = expected_experts(base, lora)
        assert found["model.layers.0.mlp.experts.gate_up_proj"] == (4, 32, 96)
        assert found["model.layers.0.mlp.experts.down_proj"] == (4, 48, 32)


def test_ranks_and_layers_of_experts_are_as_configured(trial: MakeConfig) -> None:
    base = packed("qwen3_moe")
    config = trial(target_modules=["q_proj", "experts"], layers_to_transform=[1], rank_pattern={"experts.down_proj": 2})
    model, modules = adapted(base, config), expected_modules(base, config.lora)
    extra = expected_extra_trainables(base, config, modules, load_tokenizer(config.base))
    wanted = expected(config, modules, extra)
    assert (
        set(adapted_parts(model))
        == set(wanted["lora.rank"])
        == {
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.experts.gate_up_proj",
            "model.layers.1.mlp.experts.down_proj",
        }
    )
    assert wanted["lora.rank"]["model.layers.1.mlp.experts.down_proj"] == 2
    assert wanted["lora.target_modules"] == ["experts.down_proj", "experts.gate_up_proj", "q_proj"]
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert wanted["num_trainable_parameters"] == trainable
    layer = adapted_parts(model)["model.layers.1.mlp.experts.down_proj"]
    assert layer.lora_A["default"].weight.shape == (4 * 2, 24)


def test_experts_alone_in_some_layers_with_a_scale_of_their_own(trial: MakeConfig, tmp_path: Path) -> None:
    base = packed("qwen3_moe")
    config = trial(target_modules=["experts"], layers_to_transform=[1], rslora=True, alpha_pattern={"down_proj": 3})
    model = adapted(base, config)
    down = "model.layers.1.mlp.experts.down_proj"
    assert set(adapted_parts(model)) == {down, "model.layers.1.mlp.experts.gate_up_proj"}
    assert adapted_parts(model)[down].scaling["default"] == pytest.approx(3 / 4**0.5)
    Adapter.of(model).save(tmp_path)
    again = PeftModel.from_pretrained(base_model("qwen3_moe"), tmp_path)
    layer = again.get_base_model().model.layers[1].mlp.experts
    assert (layer.parameter_name, layer.scaling["default"]) == ("down_proj", pytest.approx(3 / 4**0.5))
    assert not hasattr(again.get_base_model().model.layers[0].mlp.experts, "lora_A")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_updates_and_their_gradients_are_pefts(family: str, trial: MakeConfig, tmp_path: Path) -> None:
    """PEFT adds the whole update to plain weights; here each expert's inputs go through A and B."""
    quantized, config = packed(family), trial(target_modules=["experts"])
    model = adapted(quantized, config)
    assert all(isinstance(layer, AdaptedExperts) for layer in expert_layers(model).values())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    Adapter.of(model).save(tmp_path)
    plain = base_model(family)
    for name, _ in list(plain.named_parameters()):
        weight = quantized.get_parameter(name)
        if hasattr(weight, "scales"):
            plain.get_parameter(name).data = (
                weight.dequantized().mT if weight.is_transposed else weight.dequantized()
            ).contiguous()
    peft = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    losses = []
    for each in (model, peft):
        loss = each(input_ids=IDS).logits.square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    theirs = {name: each.grad for name, each in peft.named_parameters() if each.requires_grad}
    ours = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        assert (gradient - theirs[name]).abs().max() <= 1e-5 * theirs[name].abs().max(), name


def test_recomputed_layers_apply_the_update_again(trial: MakeConfig) -> None:
    base, config = packed("mixtral"), trial(target_modules=["experts"])
    gradients = []
    for recompute in (False, True):
        model = adapted(base, config).train()
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        model(input_ids=IDS).logits.square().mean().backward()
        gradients.append([each.grad for each in model.parameters() if each.requires_grad])
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(*gradients, strict=True))


def test_saved_matrices_of_experts_are_loaded_into_the_model_of_the_trial(trial: MakeConfig) -> None:
    base, config = packed("qwen3_moe"), trial(target_modules=["q_proj", "experts"])
    model = adapted(base, config)
    weights = Adapter.of(model).copied().weights
    other = adapted(base, config)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    load_adapter_weights(other, weights)
    again = Adapter.of(other).weights
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_first_weights_of_experts_are_drawn_from_the_seed(trial: MakeConfig) -> None:
    base = packed("qwen3_moe")
    for init, std in (("default", 1 / (3 * 32) ** 0.5), ("gaussian", 1 / 4)):
        layers = [adapted_parts(adapted(base, trial(target_modules=["experts"], init=init))) for _ in range(2)]
        name = "model.layers.0.mlp.experts.gate_up_proj"
        one, other = (each[name].lora_A["default"].weight for each in layers)
        assert torch.equal(one, other)
        assert one.std().item() == pytest.approx(std, rel=0.1)
        assert not layers[0][name].lora_B["default"].weight.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropout": 0.05}, r"target_modules names experts, .* with dropout 0.05; set dropout: 0"),
        ({"dora": True}, "with dora true; set dora: false"),
        ({"init": "eva"}, "with init eva; use default or gaussian"),
        ({"init": "olora"}, "with init olora; use default or gaussian"),
        ({"bias": "all"}, "with bias all; set bias: none"),
    ],
)
def test_what_peft_cannot_do_with_experts_is_refused(
    document: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    lora = {"target_modules": ["q_proj", "experts"], "dropout": 0} | fields
    with pytest.raises(SpecError, match=message):
        parse_spec(document | {"lora": lora})
    parse_spec(document | {"lora": fields})  # without experts


def test_experts_of_another_form_are_refused() -> None:
    lora = LoraSection(target_modules=["experts"], dropout=0)
    with pytest.raises(TrialError, match="'experts' names experts of a form that this version cannot adapt"):
        expected_modules(base_model("llama4_text"), lora)
    with pytest.raises(TrialError, match="'experts' names no layer of this base"):
        expected_modules(base_model("jamba"), lora)


def test_experts_are_checked_before_the_base_is_loaded(document: dict[str, Any], tmp_path: Path) -> None:
    base_config("qwen3_moe").save_pretrained(str(tmp_path))  # without weights
    section = {"base": {"model": str(tmp_path)}}
    check_targets(parse_spec(document | section | {"lora": {"target_modules": ["experts"], "dropout": 0}}))
    for target in ("experts.up_proj", "down_proj"):
        wrong = {"target_modules": [target], "dropout": 0}
        said = rf"^base.model {tmp_path}: .*'{target}' names no layer of this base; .* experts.gate_up_proj"
        with pytest.raises(RequestError, match=said):
            check_targets(parse_spec(document | section | {"lora": wrong}))


def test_targets_of_a_multimodal_base_are_checked_before_it_is_loaded(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = base_config("qwen3_moe").to_dict() | {"rope_parameters": rope}
    del text["model_type"], text["architectures"]
    vision["deepstack_visual_indexes"] = [0]  # type: ignore[assignment]
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    config.save_pretrained(str(tmp_path))
    built = []
    monkeypatch.setattr("orchestrator.base.empty_model", lambda base: built.append(base) or empty_model(base))
    section = {"base": {"model": str(tmp_path)}, "search": {"space": {"lora.rank": {"choice": [2, 4, 8]}}}}
    for targets in (["q_proj", "experts"], ["experts.down_proj"], ["q_proj"]):
        check_targets(parse_spec(document | section | {"lora": {"target_modules": targets, "dropout": 0}}))
    assert len(built) == 3
    for wrong in ("experts.nonsense", "nonsense"):
        lora = {"target_modules": ["q_proj", wrong], "dropout": 0}
        said = f"'{wrong}' names no layer of this base; it has experts.down_proj, "
        with pytest.raises(RequestError, match=said) as refused:
            check_targets(parse_spec(document | section | {"lora": lora}))
        assert refused.value.remedy == "Name layers of the text model in lora.target_modules."


@pytest.mark.parametrize("family", MOE)
def test_the_layers_of_a_base_without_weights_are_those_of_the_loaded_one(family: str, tmp_path: Path) -> None:
    base_config(family).save_pretrained(str(tmp_path))
    assert linear_layers(empty_model(BaseSection(model=str(tmp_path)))) == linear_layers(base_model(family))


def test_check_and_note_build_a_base_once(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_config("qwen3_moe").save_pretrained(str(tmp_path))
    built = []
    monkeypatch.setattr("orchestrator.base.empty_model", lambda base: built.append(base) or empty_model(base))
    space = {"base.quantization": {"choice": ["none", "int8", "nf4"]}}
    spec = parse_spec(
        document
        | {"base": {"model": str(tmp_path)}, "lora": {"target_modules": ["q_proj"]}, "search": {"space": space}}
    )
    empty = EmptyBases()
    check_targets(spec, empty)
    assert len(notes_on_size(spec, empty)) == 3
    assert len(built) == 1
    kinds = {type(module) for module in empty.of(spec.base).modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {torch.nn.Linear}, "a note quantizes a copy"


@pytest.mark.parametrize(
    ("fields", "message", "remedy"),
    [
        ({"model_type": "unheard_of"}, "cannot be loaded: .*does not recognize", "A newer transformers may know it"),
        (
            {"model_type": "unheard_of", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
            "brings its own Python code",
            "If you trust that code, set base.trust_remote_code: true",
        ),
        ({"model_type": "clip"}, "no class that generates text", "Give a model whose config.json names"),
    ],
)
def test_a_base_with_experts_that_cannot_be_built_is_refused_or_not_noted(
    fields: dict[str, Any], message: str, remedy: str, document: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_experts": 4}))
    section = {"base": {"model": str(tmp_path)}}
    spec = parse_spec(document | section)
    check_targets(spec)
    assert notes_on_size(spec, EmptyBases()) == []
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(document | section))
    answer = CliRunner().invoke(app, ["check", str(file)])
    assert answer.exit_code == 0, answer.output
    with pytest.raises(RequestError, match=message) as refused:
        check_targets(parse_spec(document | section | {"lora": {"target_modules": ["q_proj"]}}))
    assert refused.value.remedy.startswith(remedy)


@pytest.mark.parametrize("saved", ["experts", "mlp", "layers.1"])
def test_experts_are_adapted_or_trained_in_full_but_not_both(
    saved: str, document: dict[str, Any], tmp_path: Path
) -> None:
    fields = {"target_modules": ["q_proj", "experts.down_proj"], "dropout": 0, "modules_to_save": [saved]}
    said = f"lora.modules_to_save: {saved} contains the adapted experts experts.down_proj; adapt them or train them in"
    with pytest.raises(TrialError, match=said):
        expected_modules(base_model("qwen3_moe"), LoraSection(**fields))
    base_config("qwen3_moe").save_pretrained(str(tmp_path))
    base = {"model": str(tmp_path), "quantization": "none"}
    with pytest.raises(RequestError, match=f"base.model {tmp_path}: {said}"):
        check_targets(parse_spec(document | {"base": base, "lora": fields}))
    expected_modules(base_model("qwen3_moe"), LoraSection(**fields | {"target_modules": ["q_proj"]}))
    elsewhere = {"modules_to_save": ["layers.1.mlp"], "layers_to_transform": [0]}
    expected_modules(base_model("qwen3_moe"), LoraSection(**fields | elsewhere))


@pytest.mark.parametrize(
    ("target", "are_fused"),
    [
        ("experts", True),
        ("mlp.experts.down_proj", True),
        ("layers.1.mlp.experts", True),
        ("experts.0.w1", False),
        ("layers.1.experts.10", False),
        ("shared_experts.down_proj", False),
    ],
)
def test_linear_layers_of_single_experts_are_no_fused_experts(target: str, are_fused: bool) -> None:
    lora = LoraSection(target_modules=["q_proj", target], dropout=0)
    assert lora.names_experts == are_fused
    if not are_fused:
        LoraSection(target_modules=["q_proj", target], dropout=0.05, dora=True)
