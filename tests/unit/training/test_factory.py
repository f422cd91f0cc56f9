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
from orchestrator.training.fast.plan import factory
from orchestrator.training.fast.plan.eligibility import unsupported_reason
from orchestrator.training.fast.plan.factory import CPU_FULL, EngineSpec, engine_for, pass_tokens, plan_slots
from orchestrator.training.fast.step.engine import CPU_TOKENS, EvaluationBatch
from orchestrator.training.fast.step.flat_batch import TABLE, TokenizedRows

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
        (GPT2Config(n_embd=32, n_layer=1, n_head=2), "model type 'gpt2' (supported: llama, mistral, qwen2)"),
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
            "RoPE type 'dynamic'",
        ),
        (LlamaConfig(**SIZES, attention_dropout=0.1), "attention dropout"),
        (LlamaConfig(**SIZES, logit_scale=0.5), "logits changed by logit_scale"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_what_the_base_must_be(trial: MakeConfig, config: PreTrainedConfig, reason: str | None) -> None:
    model = model_of(config)
    assert unsupported_reason(trial(), model, LONGEST) == reason


def test_a_head_with_a_bias_is_not_held(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.lm_head = torch.nn.Linear(32, 90, device="meta")
    assert unsupported_reason(trial(), model, LONGEST) == "a bias on the LM head"


def test_a_layer_of_another_type_is_not_held(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.up_proj.half()
    assert unsupported_reason(trial(), model, LONGEST) == "mlp.up_proj as a Linear of torch.float16"


def test_a_base_on_two_devices_is_not_held(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.model.norm = torch.nn.RMSNorm(32)
    assert unsupported_reason(trial(), model, LONGEST) == "a base on 2 devices"


def test_an_adapter_elsewhere_is_not_held(trial: MakeConfig) -> None:
    model = model_of(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.router = torch.nn.Linear(32, 4, bias=False, device="meta")
    assert unsupported_reason(trial(), model, LONGEST) == "an adapter on router"
    assert unsupported_reason(trial(lora={"target_modules": ["q_proj", "mlp.up_proj"]}), model, LONGEST) is None


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
    assert unsupported_reason(trial(**sections), model, LONGEST) == reason


@pytest.mark.parametrize(
    ("training", "plan"),
    [
        ({}, (True, "nothing")),
        ({"recompute": True}, (True, "layers")),
        ({"recompute": False, "dequantize": "per_layer"}, (False, "nothing")),
        ({"dequantize": "once"}, (True, "nothing")),
    ],
    ids=str,
)
def test_a_cpu_gives_nothing_up_unless_told(
    trial: MakeConfig, base: Any, training: dict[str, Any], plan: tuple[bool, str]
) -> None:
    config = trial(training=training)
    rows = TokenizedRows([[1, 2, 3]], [[1, 2, 3]])
    engine, found = engine_for(base, [config], rows, rows)
    assert found.record() == {
        "keeps_base": plan[0], "recompute": plan[1], "max_tokens": CPU_TOKENS,
    }  # fmt: skip
    assert engine._decoder.keeps_base == plan[0]
    assert engine._recompute == plan[1]


def test_an_engine_serves_one_trial_after_another_and_goes_with_its_base(trial: MakeConfig) -> None:
    bases = [load_base(BaseSection(model="embedded", compute_dtype="float32"))]

    def engine(longest: int = 3, **sections: dict[str, Any]) -> Any:
        config, rows = trial(**sections), TokenizedRows([[1] * longest], [[1] * longest])
        return engine_for(bases[0], [config], rows, rows)[0]

    first = engine(lora={"rank": 4}, training={"learning_rate": 1e-3, "seed": 1})
    assert engine(lora={"rank": 4, "dropout": 0.3}, training={"learning_rate": 1e-4}) is first
    second = engine(lora={"rank": 8})
    assert second is not first
    assert second.adapters.rank == 8
    assert second._decoder is first._decoder, "the base is dequantised once"
    assert engine(lora={"rank": 4, "target_modules": ["q_proj"]}) is not first
    assert engine(lora={"rank": 4}, training={"adapter_dtype": "bfloat16"}).adapters.weights.dtype == torch.bfloat16
    assert engine(lora={"rank": 4}) is first
    assert engine(lora={"rank": 4}, training={"dequantize": "per_layer"})._decoder is not first._decoder
    longer = engine(lora={"rank": 4}, longest=200)._decoder
    assert longer.longest >= 200 > first._decoder.longest

    standing, gone = len(factory._engines), weakref.ref(bases[0])
    del bases[:], first, second, longer
    gc.collect()
    assert gone() is None, "an engine keeps the base alive"
    assert len(factory._engines) == standing - 1


def test_rows_shorter_than_a_tile_have_angles_for_its_filler(trial: MakeConfig, base: Any) -> None:
    config, rows = trial(), TokenizedRows([[1, 2, 3]], [[1, 2, 3]])
    engine, _ = engine_for(base, [config], rows, rows)
    table = dict.fromkeys(TABLE, 0.0) | {"keep_scale": 1.0}
    (scores,) = engine.evaluate([EvaluationBatch(engine, 0, rows, table)])
    assert scores.loss > 0


# Many at a time


def test_an_engine_for_many_has_the_largest_rank_and_all_layers(trial: MakeConfig, base: Any) -> None:
    rows = TokenizedRows([[1, 2, 3]], [[1, 2, 3]])
    configs = [
        trial(lora={"rank": 4, "target_modules": ["q_proj"]}),
        trial(lora={"rank": 12, "target_modules": ["mlp.up_proj"]}),
    ]
    engine, _ = engine_for(base, configs, rows, rows, 3)
    names = {name.rpartition(".")[0] for name, _ in engine.adapters.matrices(2, 12, engine.adapters.weights)}
    assert (engine.adapters.num_slots, engine.adapters.rank) == (3, 12)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "up_proj"}
    assert engine_for(base, configs[::-1], rows, rows, 3)[0] is engine
    assert engine_for(base, configs, rows, rows, 2)[0] is not engine


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({}, None),
        ({"lora": {"rank": 2, "target_modules": ["v_proj"]}}, None),
        ({"training": {"learning_rate": 0.5, "batch_size": 64, "seed": 3, "weight_decay": 0.1}}, None),
        ({"lora": {"rank": 9}}, "its rank or its layers are more than the slots were made for"),
        (
            {"lora": {"rank": 2, "target_modules": ["q_proj", "down_proj"]}},
            "its rank or its layers are more than the slots were made for",
        ),
        (
            {"training": {"adapter_dtype": "bfloat16"}},
            "training.adapter_dtype is another than that of the trials beside it",
        ),
        (
            {"training": {"optimizer": "paged_adamw_8bit"}},
            "the precision of training.optimizer's moments is another than that of the trials beside it",
        ),
        ({"training": {"optimizer": "paged_adamw_32bit"}}, None),
        ({"training": {"recompute": True}}, "training.recompute is another than that of the trials beside it"),
        ({"training": {"dequantize": "once"}}, "training.dequantize is another than that of the trials beside it"),
        ({"training": {"precision": "bf16"}}, "training.precision is another than that of the trials beside it"),
    ],
    ids=str,
)
def test_what_cannot_be_beside_others(
    trial: MakeConfig, base: Any, sections: dict[str, Any], reason: str | None
) -> None:
    lora = {"rank": 8, "target_modules": ["q_proj", "v_proj"]}
    kind = EngineSpec.of(base, [trial(lora=lora), trial(lora=lora | {"rank": 4})], 4)
    assert kind.refuses(base, trial(**{"lora": lora} | sections)) == reason


def test_a_pass_holds_the_largest_batch_of_one_and_the_usual_ones_of_many(trial: MakeConfig, base: Any) -> None:
    rows = TokenizedRows(
        [[1] * length for length in (2, 2, 2, 2, 2, 50)], [[1] * length for length in (2, 2, 2, 2, 2, 50)]
    )
    configs = [trial(training={"batch_size": 1}), trial(training={"batch_size": 1, "accumulation": 2})]
    assert pass_tokens(EngineSpec.of(base, configs, 1), rows) == 52
    assert pass_tokens(EngineSpec.of(base, configs, 2), rows) == 52, "2 * 2 * 10 is less"
    assert pass_tokens(EngineSpec.of(base, configs, 4), rows) == int(1.1 * 4 * 2 * 10)


@pytest.mark.parametrize(("wanted", "batch_size", "slots"), [(8, 1, 8), (8, 4, 2), (1, 4, 1), (8, 16, 1)])
def test_a_cpu_takes_as_many_as_keep_it_busy(
    trial: MakeConfig, base: Any, wanted: int, batch_size: int, slots: int
) -> None:
    rows = TokenizedRows([[1] * 64] * 100, [[1] * 64] * 100)
    count, reason = plan_slots(base, [trial(training={"batch_size": batch_size})], rows, rows, wanted)
    assert count == slots
    assert reason == f"a batch has up to {64 * batch_size} tokens, and a core is busy with {CPU_FULL}"
