"""Which trials the fast engine holds, and what stands on a base from one trial to the next."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from orchestrator.base import load_base
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.spec.sections import BaseSection
from orchestrator.training.applied import expected_modules
from orchestrator.training.fast import build
from orchestrator.training.fast.build import engine_for, why_not
from orchestrator.training.fast.engine import CPU_TOKENS
from orchestrator.training.fast.row import TABLE, Rows

pytestmark = pytest.mark.usefixtures("on_cpu")

LONGEST = 12
SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
MakeConfig = Callable[..., TrialConfig]


@pytest.fixture
def trial(document: dict[str, Any]) -> MakeConfig:
    """`trial(lora={"rank": 4}, training={...})`."""

    def make(**sections: dict[str, Any]) -> TrialConfig:
        base = {"model": "embedded", "compute_dtype": "float32"} | sections.pop("base", {})
        return parse_spec(document | {"base": base} | sections).trial_config({})

    return make


def model_of(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SIZES), None),
        (Qwen2Config(**SIZES), None),
        (MistralConfig(**SIZES, sliding_window=LONGEST), None),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2), "model type 'gpt2' (it knows llama, mistral, qwen2)"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "activation 'gelu'"),
        (
            MistralConfig(**SIZES, sliding_window=LONGEST - 1),
            "a sliding window of 11 tokens, shorter than the longest row (12)",
        ),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0),
            "a sliding window of 8 tokens, shorter than the longest row (12)",
        ),
        (Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=8), None),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "positions of type 'dynamic'",
        ),
        (LlamaConfig(**SIZES, attention_dropout=0.1), "dropout in attention"),
        (LlamaConfig(**SIZES, logit_scale=0.5), "logits that are changed (logit_scale)"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_what_the_base_must_be(trial: MakeConfig, config: PreTrainedConfig, reason: str | None) -> None:
    model = model_of(config)
    assert why_not(trial(), model, expected_modules(model, trial().lora), LONGEST) == reason


def test_a_head_with_a_bias_is_not_held(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.lm_head = torch.nn.Linear(32, 90, device="meta")
    assert why_not(trial(), model, [], LONGEST) == "a bias on the LM head"


def test_a_layer_of_another_type_is_not_held(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.up_proj.half()
    assert why_not(trial(), model, [], LONGEST) == "mlp.up_proj as a Linear of torch.float16"


def test_a_base_on_two_devices_is_not_held(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.model.norm = torch.nn.RMSNorm(32)
    assert why_not(trial(), model, [], LONGEST) == "a base on 2 devices"


def test_an_adapter_elsewhere_is_not_held(trial: MakeConfig) -> None:
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.router"]
    assert why_not(trial(), model_of(LlamaConfig(**SIZES)), modules, LONGEST) == "an adapter on router"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"base": {"compute_dtype": "bfloat16"}}, None),
        ({"base": {"compute_dtype": "bfloat16"}, "training": {"precision": "bf16"}}, None),
        ({"training": {"precision": "bf16"}}, "base.compute_dtype float32 under precision bf16"),
        ({"base": {"compute_dtype": "float16"}}, "base.compute_dtype float16 under precision none"),
        ({"lora": {"bias": "all"}}, "lora.bias all"),
        ({"training": {"optimizer": "sgd"}}, "training.optimizer sgd"),
    ],
    ids=str,
)
def test_what_the_trial_must_be(trial: MakeConfig, sections: dict[str, Any], reason: str | None) -> None:
    model = model_of(LlamaConfig(**SIZES))
    assert why_not(trial(**sections), model, [], LONGEST) == reason


@pytest.mark.parametrize(
    ("training", "plan"),
    [
        ({}, (True, "nothing")),
        ({"recompute": True}, (True, "layers")),
        ({"recompute": False, "dequantise": "per_layer"}, (False, "nothing")),
        ({"dequantise": "once"}, (True, "nothing")),
    ],
    ids=str,
)
def test_a_cpu_gives_nothing_up_unless_told(
    trial: MakeConfig, base: Any, training: dict[str, Any], plan: tuple[bool, str]
) -> None:
    config = trial(training=training)
    rows = Rows([[1, 2, 3]], [[1, 2, 3]])
    engine, found = engine_for(base, config, expected_modules(base, config.lora), rows, rows)
    assert found.record() == {
        "keeps_base": plan[0], "recompute": plan[1], "max_tokens": CPU_TOKENS,
    }  # fmt: skip
    assert engine._decoder.keeps == plan[0]
    assert engine._recompute == plan[1]


def test_an_engine_serves_one_trial_after_another_and_goes_with_its_base(trial: MakeConfig) -> None:
    bases = [load_base(BaseSection(model="embedded", compute_dtype="float32"))]

    def engine(longest: int = 3, **sections: dict[str, Any]) -> Any:
        config, rows = trial(**sections), Rows([[1] * longest], [[1] * longest])
        return engine_for(bases[0], config, expected_modules(bases[0], config.lora), rows, rows)[0]

    first = engine(lora={"rank": 4}, training={"learning_rate": 1e-3, "seed": 1})
    assert engine(lora={"rank": 4, "dropout": 0.3}, training={"learning_rate": 1e-4}) is first
    second = engine(lora={"rank": 8})
    assert second is not first
    assert second.adapters.rank == 8
    assert second._decoder is first._decoder, "the base is dequantised once"
    assert engine(lora={"rank": 4, "target_modules": ["q_proj"]}) is not first
    assert engine(lora={"rank": 4}, training={"adapter_dtype": "bfloat16"}).adapters.weights.dtype == torch.bfloat16
    assert engine(lora={"rank": 4}) is first
    assert engine(lora={"rank": 4}, training={"dequantise": "per_layer"})._decoder is not first._decoder
    longer = engine(lora={"rank": 4}, longest=200)._decoder
    assert longer.longest >= 200 > first._decoder.longest

    standing, gone = len(build._engines), weakref.ref(bases[0])
    del bases[:], first, second, longer
    gc.collect()
    assert gone() is None, "an engine keeps the base alive"
    assert len(build._engines) == standing - 1


def test_rows_shorter_than_a_tile_have_angles_for_its_filler(trial: MakeConfig, base: Any) -> None:
    config, rows = trial(), Rows([[1, 2, 3]], [[1, 2, 3]])
    engine, _ = engine_for(base, config, expected_modules(base, config.lora), rows, rows)
    table = dict.fromkeys(TABLE, 0.0) | {"keep_scale": 1.0}
    loss, _ = engine.evaluate(rows, 0, table)
    assert loss > 0
