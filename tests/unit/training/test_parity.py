"""A new engine is compared with transformers, and one that differs is not used."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from family_cases import FAMILY_CASES, MULTIMODAL_CASES

from orchestrator.base import model_class
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import LoraSection
from orchestrator.training.engines import choose
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.separate import SeparateEngines
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.text_model import text_config
from orchestrator.training.fast.plan import parity
from orchestrator.training.fast.plan.parity import require_parity
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.expert_adapters import ExpertAdapters
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.model.targets import adapted_names, expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeRows = Callable[..., TokenizedRows]
LONGEST = 64
CASES = FAMILY_CASES | MULTIMODAL_CASES


def open_base(name: str) -> Any:
    torch.manual_seed(0)
    config = deepcopy(CASES[name][0])
    model = model_class(config).from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def open_engine(base: Any, dtype: torch.dtype = torch.float32, rank: int = 16) -> Engine:
    layers = adapted_layers(base, expected_modules(base, LoraSection()))
    adapters = Adapters(layers, 2, rank, torch.float32, dtype, torch.device("cpu"))
    return Engine(Decoder(base, dtype, LONGEST, keeps_base=True), adapters, "nothing", None, on_gpu=False)


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("name", CASES)
def test_each_family_is_the_same(name: str, rank: int, make_rows: MakeRows) -> None:
    base = open_base(name)
    engine = open_engine(base, rank=rank)
    require_parity(base, engine, make_rows(5, LONGEST))
    for flat in (engine.adapters.weights, engine.adapters.gradients):
        assert not flat.any(), "the slot is as before"
    assert not any(module._forward_hooks for module in base.modules())


def test_what_an_earlier_trial_left_in_the_first_slot_does_not_count(make_rows: MakeRows) -> None:
    base = open_base("olmo2")
    engine = open_engine(base)
    layers = expected_modules(base, LoraSection())
    engine.adapters.set_patterns(0, dict.fromkeys(layers, 3), dict.fromkeys(layers, 5.0))
    engine.adapters.weights[0].normal_()
    require_parity(base, engine, make_rows(5, LONGEST))


@pytest.mark.parametrize("name", CASES)
def test_each_family_is_the_same_in_bfloat16(name: str, make_rows: MakeRows) -> None:
    base = open_base(name).to(torch.bfloat16)
    require_parity(base, open_engine(base, torch.bfloat16), make_rows(5, LONGEST))


@pytest.mark.parametrize("name", CASES)
def test_rounding_is_measured_on_the_base(name: str, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep random bases change rounding into differences beyond any fixed bound: 0.15 at the shape of Phi-4."""
    monkeypatch.setitem(parity.TOLERANCES, torch.bfloat16, (0.02, 0.0))
    base = open_base(name).to(torch.bfloat16)
    require_parity(base, open_engine(base, torch.bfloat16), make_rows(5, LONGEST))


def scale_attention(base: Any) -> None:
    base.model.layers[1].self_attn.scaling *= 2


def widen_window(base: Any) -> None:
    base.config.sliding_window += 2  # masks are made from it


WITH_EXPERTS = [name for name, (config, _) in CASES.items() if FAMILIES[text_config(config).model_type].experts]
EXPERTS = LoraSection(dropout=0, target_modules=["q_proj", "experts"])


def open_expert_engine(base: Any, dtype: torch.dtype) -> Engine:
    layers, cpu = adapted_layers(base, adapted_names(base, EXPERTS)), torch.device("cpu")
    adapters = Adapters(layers, 2, 16, torch.float32, dtype, cpu, expert_rank=8)
    return Engine(Decoder(base, dtype, LONGEST, keeps_base=True), adapters, "nothing", None, on_gpu=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_adapted_experts_are_the_same(name: str, dtype: torch.dtype, make_rows: MakeRows) -> None:
    base = open_base(name).to(dtype)
    implementation = base.config._experts_implementation
    require_parity(base, open_engine(base, dtype), make_rows(9))
    require_parity(base, open_expert_engine(base, dtype), make_rows(9))
    assert base.config._experts_implementation == implementation
    assert not any(vars(module).get("updates") for module in base.modules())


def test_wrong_adapters_of_experts_are_noticed(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an engine without such adapters was right on the same base."""
    base = open_base("qwen3_moe")
    require_parity(base, open_engine(base), make_rows(9))
    monkeypatch.setattr(ExpertAdapters, "forward", lambda own, y, rows: y.new_zeros(len(rows), own._a.shape[1]))
    require_parity(base, open_engine(base), make_rows(9))
    with pytest.raises(TrialError, match="on this base the fast engine differs from transformers"):
        require_parity(base, open_expert_engine(base, torch.float32), make_rows(9))


def test_separate_engines_that_adapt_experts_are_compared(
    trial: Callable[..., TrialConfig], make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an engine without such adapters has more layers."""
    base, rows = open_base("qwen3_moe"), make_rows(9)
    targets = (["q_proj", "k_proj", "v_proj", "o_proj"], ["experts"])
    configs = [trial(lora={"rank": 4, "dropout": 0, "target_modules": each}) for each in targets]
    SeparateEngines(base, configs, rows, rows, 2)
    monkeypatch.setattr(parity, "_compared", WeakKeyDictionary())
    monkeypatch.setattr(ExpertAdapters, "forward", lambda own, y, rows: y.new_zeros(len(rows), own._a.shape[1]))
    with pytest.raises(TrialError, match="on this base the fast engine differs from transformers"):
        SeparateEngines(base, configs, rows, rows, 2)


def change_norm(base: Any) -> None:
    norm = base.model.layers[1].self_attn.k_norm
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 100.0)


def change_activation(base: Any) -> None:
    base.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def change_scores(base: Any) -> None:
    base.model.layers[0].mlp.gate.norm_topk_prob ^= True


def scale_scores(base: Any) -> None:
    """Rounding would hide it, if the engine's own scores were in what rounding is measured with."""
    for layer in base.model.layers:
        router = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
        router.register_forward_hook(lambda _router, _inputs, output: (output[0], 1.2 * output[1], output[2]))


def change_router(base: Any) -> None:
    gate = base.model.layers[1].mlp.gate
    gate.weight = torch.nn.Parameter(gate.weight.flip(0), requires_grad=False)


def change_sinks(base: Any) -> None:
    attention = base.model.layers[1].self_attn
    attention.sinks = torch.nn.Parameter(attention.sinks + 20, requires_grad=False)


def change_limit(base: Any) -> None:
    base.model.layers[0].mlp.experts.limit = 0.1


CHANGES = {
    "qwen3_moe": (change_scores, scale_scores, change_router, scale_attention),
    "gpt_oss with a window, nf4": (scale_scores, change_sinks, change_limit, widen_window),
    "qwen3 with a window": (scale_attention, widen_window, change_norm, change_activation),
    "phi3 with heads that are rotated in part, nf4": (scale_attention, widen_window),
    "gemma2": (scale_attention, change_activation),
    "gemma3_text with two rotary embeddings, nf4": (scale_attention, change_norm, widen_window),
    "olmo2": (scale_attention, change_norm),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "change"), [(name, change) for name in CHANGES for change in CHANGES[name]])
def test_another_computation_is_noticed(
    name: str, change: Callable[[Any], None], dtype: torch.dtype, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers may change what a model computes, without another module or configuration field."""
    base, rows = open_base(name).to(dtype), make_rows(5, LONGEST)
    engine = open_engine(base, dtype)
    change(base)
    with pytest.raises(TrialError, match=r"on this base the fast engine differs from transformers: (loss|\d+%)"):
        require_parity(base, engine, rows)
    monkeypatch.setattr(parity, "_difference", None)
    with pytest.raises(TrialError, match="differs from transformers"):  # it is not computed again
        require_parity(base, engine, rows)


def test_a_trial_is_left_to_trl(
    trial: Callable[..., TrialConfig], make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "_difference", lambda *_: "on this base the fast engine differs from transformers")
    base, rows = open_base("olmo2"), make_rows(5, 9)
    inputs = TrialInputs(base, None, None, rows, rows)  # type: ignore[arg-type]
    reason = choose.find_slot(trial(training={"engine": "auto"}), inputs)
    assert reason == "on this base the fast engine differs from transformers"
    with pytest.raises(TrialError, match="differs from transformers"):
        choose.find_slot(trial(training={"engine": "fast"}), inputs)


@pytest.mark.parametrize(("length", "differs"), [(128, False), (256, True)])
def test_a_wrong_window_is_noticed_in_bfloat16(make_rows: MakeRows, length: int, differs: bool) -> None:
    """Only rows that are longer than the window can show it."""
    name = "gemma3_text with two rotary embeddings, nf4"
    base = open_base(name).to(torch.bfloat16)
    base.config.sliding_window = 10_000
    layers = adapted_layers(base, expected_modules(base, LoraSection()))
    adapters = Adapters(layers, 1, 8, torch.float32, torch.bfloat16, torch.device("cpu"))
    engine = Engine(Decoder(base, torch.bfloat16, 256, keeps_base=True), adapters, "nothing", None, on_gpu=False)
    base.config.sliding_window = 128
    if differs:
        with pytest.raises(TrialError, match="differs from transformers"):
            require_parity(base, engine, make_rows(length))
    else:
        require_parity(base, engine, make_rows(length))


def test_longer_rows_are_compared_again(make_rows: MakeRows) -> None:
    """The rows of a first sweep may be shorter than a window, and those of a second longer."""
    base = open_base("olmo3")
    engine = open_engine(base)
    require_parity(base, engine, make_rows(6))
    widen_window(base)
    require_parity(base, engine, make_rows(6))
    with pytest.raises(TrialError, match="differs from transformers"):
        require_parity(base, engine, make_rows(LONGEST))


def test_little_memory(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    base = open_base("olmo3")
    base.config.sliding_window = 40
    engine, lengths, difference = open_engine(base), [], parity._difference

    def short_of_memory(base: Any, engine: Engine, ids: Any) -> str | None:
        lengths.append(len(ids))
        if len(ids) > parity.TOKENS:
            raise torch.OutOfMemoryError
        return difference(base, engine, ids)

    monkeypatch.setattr(parity, "_difference", short_of_memory)
    require_parity(base, engine, make_rows(LONGEST))
    assert lengths == [LONGEST, parity.TOKENS]
    assert "compared with transformers on 48 tokens only" in caplog.text


def test_a_router_is_not_called(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base("qwen3_moe")
    engine = open_engine(base)
    monkeypatch.setattr(base.model.layers[0].mlp, "forward", lambda states: states)
    with pytest.raises(TrialError, match="not all routers of experts were called"):
        require_parity(base, engine, make_rows(9))


def test_transformers_fails(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base("olmo2")
    engine = open_engine(base)
    monkeypatch.setattr(base.model.layers[0], "forward", lambda *_, **__: 1 / torch.zeros(2, 3).view(7))
    with pytest.raises(TrialError, match="cannot be compared with transformers on this base"):
        require_parity(base, engine, make_rows(9))
