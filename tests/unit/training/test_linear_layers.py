"""`all-linear` adapts the layers that a step on text trains: no routers, no towers, nothing that PEFT cannot adapt."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_bases import DENSE, MAMBA, MOE, MULTIMODAL, base_config, base_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orchestrator.base import load_tokenizer, share_modules
from orchestrator.errors import RequestError, TrialError
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.spec.sections import LoraSection
from orchestrator.training.engines.check_targets import check_targets
from orchestrator.training.model.linear_layers import PEFT_REFUSES, linear_layers
from orchestrator.training.model.peft_model import lora_layers, model_from_peft
from orchestrator.training.model.targets import expected, expected_extra_trainables, expected_modules, target_warnings

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeConfig = Callable[..., TrialConfig]

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}

ADAPTED: dict[str, set[str]] = {
    "qwen2_moe": ATTENTION | MLP,  # of the shared expert
    "qwen3_moe": ATTENTION,
    "qwen3_next": ATTENTION | {"in_proj_ba", "in_proj_qkvz", "out_proj"},
    "mixtral": ATTENTION,
    "olmoe": ATTENTION,
    "deepseek_v3": LATENT,
    "glm4_moe": ATTENTION,
    "granitemoe": ATTENTION,
    "gpt_oss": ATTENTION,
    "phimoe": ATTENTION,
    "ernie4_5_moe": ATTENTION,
    "jetmoe": {"kv_proj"},
    "hunyuan_v1_moe": ATTENTION,
    "afmoe": ATTENTION,
    "doge": ATTENTION | MLP | {"dt_proj"},
    "llama4_text": ATTENTION | MLP,
    "granitemoehybrid": ATTENTION | {"input_linear", "output_linear"},
    "bamba": ATTENTION | MLP | {"in_proj"},
    "jamba": ATTENTION | MLP | {"in_proj", "out_proj", "x_proj"},
    **dict.fromkeys(MULTIMODAL, ATTENTION | MLP),
}
"""Family -> last parts of the names of the layers that `all-linear` adapts."""

WORKING: dict[str, set[str]] = {
    "mamba": {"in_proj"},
    "mamba2": {"in_proj"},
    "falcon_mamba": {"in_proj"},
    "falcon_h1": ATTENTION | MLP | {"in_proj"},
    "nemotron_h": ATTENTION | {"up_proj", "down_proj", "in_proj"},
}
"""Family in which PEFT refuses a layer -> the layers that can be adapted."""


@pytest.fixture
def trial(document: dict[str, Any]) -> MakeConfig:
    """`trial(rank=4)`: a trial with these fields of lora."""
    base = {"model": "embedded", "quantization": "none", "compute_dtype": "float32"}
    return lambda **lora: parse_spec(document | {"base": base, "lora": {"rank": 4} | lora}).trial_config({})


def adapted(base: Any, config: TrialConfig) -> Any:
    """The `PeftModel` of a trial."""
    modules = expected_modules(base, config.lora)
    extra = expected_extra_trainables(base, config, modules, load_tokenizer(config.base))
    return model_from_peft(base, config, modules, extra)


def leaves(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_every_small_base_is_in_a_table() -> None:
    assert ADAPTED.keys() | WORKING.keys() == MOE.keys() | DENSE.keys() | MAMBA.keys() | MULTIMODAL.keys()


@pytest.mark.parametrize("family", ADAPTED)
def test_all_linear_adapts_what_a_step_on_text_trains(family: str, trial: MakeConfig) -> None:
    base, config = base_model(family), trial()
    modules = expected_modules(base, config.lora)
    assert leaves(modules) == ADAPTED[family]
    model = adapted(base, config)
    assert lora_layers(model).keys() == modules.keys()
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.A"):  # Doge multiplies by it, and begins with zero
            nn.init.ones_(parameter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(modules)
    model.train()
    ids = torch.arange(3, 43)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    lost = [name for name, p in trained.items() if "lora_B" in name and (p.grad is None or not p.grad.any())]
    assert not lost


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "llama4_text", "gemma3"])
def test_plain_peft_reloads_the_same_layers(family: str, trial: MakeConfig, tmp_path: Path) -> None:
    model = adapted(base_model(family), trial())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base_model(family), str(tmp_path))
    assert lora_layers(again).keys() == lora_layers(model).keys()
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("llama", None),
        ("granitemoehybrid", None),
        ("qwen3_moe", "2 modules of fused experts (model.layers.*.mlp.experts)"),
        ("llama4_text", "2 layers of routers (model.layers.*.feed_forward.router)"),
        ("qwen2_moe", "2 layers of routers (model.layers.*.mlp.shared_expert_gate)"),
        (
            "deepseek_v3",
            "6 layers that PEFT 0.21 takes by their names for fused experts (model.layers.*.mlp.gate_proj,",
        ),
        ("gemma3", "15 layers that text never reaches (model.vision_tower)"),
        ("mistral3", "17 layers that text never reaches (model.vision_tower, model.multi_modal_projector)"),
        ("mllama", "that text never reaches (model.vision_model, model.language_model.layers.1, model.multi_modal_"),
        ("qwen2_5_vl", "12 layers that text never reaches (model.visual)"),
        ("bamba", "1 layer whose weights kernels read without calling the layer (model.layers.*.mamba.out_proj)"),
    ],
)
def test_what_is_left_out_is_said(family: str, named: str | None) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    base = AutoModelForCausalLM.from_config(LlamaConfig(**shape)) if family == "llama" else base_model(family)
    said = target_warnings(base, LoraSection())
    assert len(said) == (named is not None)
    assert all(each.startswith("lora.target_modules: not adapted: ") and str(named) in each for each in said)


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("jamba", ["q_proj", "in_proj"], None),
        (
            "jamba",
            ["q_proj", "dt_proj"],
            "lora.target_modules: adapts 1 layer whose weights kernels read without calling the layer "
            "(model.layers.*.mamba.dt_proj): an adapter on them may have no effect; all-linear leaves them out",
        ),
        (
            "qwen2_moe",
            ["q_proj", "shared_expert_gate"],
            "lora.target_modules: adapts 2 layers of routers (model.layers.*.mlp.shared_expert_gate): "
            "it changes where tokens are sent; all-linear leaves them out",
        ),
    ],
)
def test_what_is_named_and_better_left_out_is_said(family: str, targets: list[str], said: str | None) -> None:
    base, lora = base_model(family), LoraSection(target_modules=targets)
    assert target_warnings(base, lora) == ([] if said is None else [said])
    assert said is None or {*targets} <= leaves(expected_modules(base, lora))


def test_the_source_of_a_class_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it takes most of the time of a search in a base with many layers of Mamba."""
    from transformers import AutoModelForCausalLM

    read: list[Any] = []
    getsource = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda each: read.append(each) or getsource(each))
    for num_layers in (2, 4):
        config = base_config("mamba")
        config.num_hidden_layers = num_layers
        found = linear_layers(AutoModelForCausalLM.from_config(config)).left_out
        assert len(found) == 3 * num_layers
    assert len(read) == len({*read})


def test_layers_of_one_number_exclude_those_of_a_tower(trial: MakeConfig) -> None:
    base, config = base_model("gemma3"), trial(layers_to_transform=[1])
    modules = expected_modules(base, config.lora)
    assert {name.rpartition(".layers.")[0] for name in modules} == {"model.language_model"}
    assert lora_layers(adapted(base, config)).keys() == modules.keys()


def test_a_listed_name_means_no_layer_of_a_tower(trial: MakeConfig) -> None:
    base, config = base_model("gemma3"), trial(target_modules=["q_proj"])
    modules = expected_modules(base, config.lora)
    assert list(modules) == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert lora_layers(adapted(base, config)).keys() == modules.keys()
    (said,) = target_warnings(base, config.lora)
    assert "2 layers that text never reaches" in said
    assert target_warnings(base, LoraSection(target_modules=["gate_proj"])) == []
    with pytest.raises(TrialError, match=r"'fc1' names only layers that text does not reach\n.*\[down_proj, gate_proj"):
        expected_modules(base, LoraSection(target_modules=["fc1"]))


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("llama4_text", "router", "'router' names 2 layers unlike a linear layer"),
        ("phimoe", "router", "'router' names 2 layers unlike a linear layer"),
        ("glm4_moe", "up_proj", "'up_proj' names 2 layers that PEFT 0.21 takes by their names for fused experts"),
        ("falcon_h1", "out_proj", "'out_proj' names 2 layers that PEFT 0.21 refuses in this family"),
        (
            "mixtral",
            "gate",
            "'gate' names no layer of this base; it has experts.down_proj, experts.gate_up_proj, k_",
        ),
    ],
)
def test_a_listed_layer_that_cannot_be_adapted_is_refused(family: str, target: str, message: str) -> None:
    with pytest.raises(TrialError) as caught:
        expected_modules(base_model(family), LoraSection(target_modules=[target, "o_proj"]))
    assert message in caught.value.message


@pytest.mark.parametrize("family", WORKING)
def test_all_linear_is_refused_with_the_list_that_works(family: str, trial: MakeConfig, tmp_path: Path) -> None:
    base = base_model(family)
    with pytest.raises(
        TrialError, match=r"all-linear includes \d layers? that PEFT 0.21 refuses .*out_proj\)"
    ) as caught:
        expected_modules(base, LoraSection())
    listed = caught.value.remedy.removeprefix("Set lora.target_modules: [").removesuffix("].").split(", ")
    assert set(listed) == WORKING[family]
    config = trial(target_modules=listed)
    assert leaves(lora_layers(adapted(base, config))) == WORKING[family]

    base_config(family).save_pretrained(str(tmp_path))  # without weights: the configuration is enough
    section = {"model": str(tmp_path), "quantization": "none", "compute_dtype": "float32"}
    document = {
        "base": section,
        "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
    }
    with pytest.raises(RequestError) as refused:
        check_targets(parse_spec(document))
    assert (caught.value.remedy, str(tmp_path) in refused.value.message) == (refused.value.remedy, True)
    check_targets(parse_spec(document | {"lora": {"target_modules": listed}}))
    space = {"lora.target_modules": {"choice": [listed, "all-linear"]}}
    with pytest.raises(RequestError, match="all-linear includes"):
        check_targets(parse_spec(document | {"lora": {"target_modules": listed}, "search": {"space": space}}))


def test_families_that_peft_refuses_are_those_of_the_table() -> None:
    types = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *PEFT_REFUSES}
    refused = set()
    for each in types:
        model = SimpleNamespace(config=SimpleNamespace(model_type=each))
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, "out_proj")  # type: ignore[arg-type]
        except ValueError:
            refused.add(each)
    assert refused == PEFT_REFUSES.keys()


def test_a_base_without_linear_layers_is_refused(trial: MakeConfig) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    base, config = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=4)), trial()
    modules = expected_modules(base, config.lora)
    extra = expected_extra_trainables(base, config, modules, load_tokenizer(config.base))
    with pytest.raises(TrialError, match="no linear layer to adapt"):
        expected(config, modules, extra)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(8, 6), nn.Linear(6, 8)


class Block(nn.Module):
    """A block with a list of experts, as in the code of models that transformers does not contain."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = nn.Linear(8, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.mixture = nn.Linear(8, 1)
        self.after = nn.Linear(8, 8)


def test_gates_beside_a_list_of_experts_are_left_out() -> None:
    model = nn.Module()
    model.layers, model.head = nn.ModuleList([Block()]), nn.Linear(8, 9)
    model.config, model.get_output_embeddings = SimpleNamespace(model_type="own"), lambda: model.head
    found = linear_layers(model)
    assert found.left_out == {"layers.0.chooser": "router", "layers.0.mixture": "router"}
    experts = {f"layers.0.experts.{i}.{each}" for i in range(3) for each in ("w1", "w2")}
    assert found.adaptable.keys() == {"layers.0.after", *experts}


def test_the_base_is_as_it_was_after_its_layers_were_found() -> None:
    base = base_model("gemma3")
    state = torch.get_rng_state()
    before = {name: (id(p), p._version) for name, p in base.named_parameters()}
    linear_layers(base)
    assert before == {name: (id(p), p._version) for name, p in base.named_parameters()}
    assert torch.equal(state, torch.get_rng_state())
    assert not base.training
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_base_with_several_stop_tokens_has_its_text_followed() -> None:
    """Gemma 3's configuration lists its stop tokens."""
    base = base_model("gemma3")
    base.config.eos_token_id = base.config.text_config.eos_token_id = [1, 2]
    assert set(linear_layers(base).left_out.values()) == {"unreached"}


def test_peft_itself_would_adapt_the_experts(trial: MakeConfig) -> None:
    """The reason for whole names: with `all-linear`, PEFT 0.21 adapts the fused experts and the router's weight."""
    peft = get_peft_model(share_modules(base_model("qwen3_moe")), LoraConfig(target_modules="all-linear"))
    assert any("experts" in name for name in lora_layers(peft))
    assert not any("experts" in name for name in lora_layers(adapted(base_model("qwen3_moe"), trial())))
