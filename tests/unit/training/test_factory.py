"""Engines: how trials are held, what is cached on a base from one trial to the next, and who can share an engine."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from orchestrator.base import load_base
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection
from orchestrator.training.fast.drive.joint import engine_for
from orchestrator.training.fast.drive.separate import SeparateEngines
from orchestrator.training.fast.plan import factory
from orchestrator.training.fast.plan.engine_spec import EngineSpec, pass_tokens
from orchestrator.training.fast.plan.memory_plan import CPU_FULL, Target, plan_slots
from orchestrator.training.fast.step.engine import CPU_TOKENS, EvaluationBatch, GenerationBatch
from orchestrator.training.fast.step.flat_batch import IGNORED, TABLE, TokenizedRows
from orchestrator.training.fast.step.generation import Asked

pytestmark = pytest.mark.usefixtures("on_cpu")

DIFFERS = "differs from that of the trials that share the engine"
MakeConfig = Callable[..., TrialConfig]


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
def test_a_cpu_saves_no_memory_unless_asked(
    trial: MakeConfig, base: Any, training: dict[str, Any], plan: tuple[bool, str]
) -> None:
    config = trial(training=training)
    rows = TokenizedRows([[1, 2, 3]], [[1, 2, 3]])
    engine, memory_plan = engine_for(base, [config], rows, rows)
    assert memory_plan.record() == {
        "keeps_base": plan[0], "recompute": plan[1], "max_tokens": CPU_TOKENS,
    }  # fmt: skip
    assert engine._decoder.keeps_base == plan[0]
    assert engine._recompute == plan[1]


def test_an_engine_is_reused_by_later_trials_and_dies_with_its_base(trial: MakeConfig) -> None:
    bases = [load_base(BaseSection(model="embedded", compute_dtype="float32"))]

    def engine(longest: int = 3, **sections: dict[str, Any]) -> Any:
        config, rows = trial(**sections), TokenizedRows([[1] * longest], [[1] * longest])
        return engine_for(bases[0], [config], rows, rows)[0]

    first = engine(lora={"rank": 4}, training={"learning_rate": 1e-3, "seed": 1})
    assert engine(lora={"rank": 4, "dropout": 0.3}, training={"learning_rate": 1e-4}) is first
    second = engine(lora={"rank": 8})
    assert second is not first
    assert second.adapters.rank == 8
    assert second._decoder is first._decoder, "the base is dequantized once"
    assert engine(lora={"rank": 4, "target_modules": ["q_proj"]}) is not first
    assert engine(lora={"rank": 4}, training={"adapter_dtype": "bfloat16"}).adapters.weights.dtype == torch.bfloat16
    assert engine(lora={"rank": 4}) is first
    assert engine(lora={"rank": 4}, training={"dequantize": "per_layer"})._decoder is not first._decoder
    longer = engine(lora={"rank": 4}, longest=200)._decoder
    assert longer.longest >= 200 > first._decoder.longest

    num_cached, gone = len(factory._engines), weakref.ref(bases[0])
    del bases[:], first, second, longer
    gc.collect()
    assert gone() is None, "an engine keeps the base alive"
    assert len(factory._engines) == num_cached - 1


def test_the_filler_of_a_tile_has_rotary_angles_when_all_rows_are_shorter(trial: MakeConfig, base: Any) -> None:
    config, rows = trial(), TokenizedRows([[1, 2, 3]], [[1, 2, 3]])
    engine, _ = engine_for(base, [config], rows, rows)
    table = dict.fromkeys(TABLE, 0.0) | {"keep_scale": 1.0}
    (scores,) = engine.evaluate([EvaluationBatch(engine, 0, rows, table)])
    assert scores.loss > 0


def test_an_answer_may_be_longer_than_all_rows(trial: MakeConfig, base: Any) -> None:
    """Rotary angles reach to the end of the longest answer, also in engines that step separately."""
    config = trial(evaluation={"metrics": ["exact_match"], "max_new_tokens": 150})
    rows, prompt = TokenizedRows([[1, 2, 3]], [[1, 2, 3]]), TokenizedRows([[1, 2, 3]], [[IGNORED] * 3])
    table = dict.fromkeys(TABLE, 0.0) | {"keep_scale": 1.0}
    separate = SeparateEngines(base, [config], rows, rows, 2).engine(1, config)
    for engine in (engine_for(base, [trial(), config], rows, rows)[0], separate):
        ((answer,),) = engine.generate([GenerationBatch(engine, Asked(0, prompt, 150, frozenset(), table))])
        assert len(answer) == 150


# Several trials at a time


def test_a_joint_engine_has_the_largest_rank_and_all_layers(trial: MakeConfig, base: Any) -> None:
    rows = TokenizedRows([[1, 2, 3]], [[1, 2, 3]])
    configs = [
        trial(lora={"rank": 4, "target_modules": ["q_proj"]}),
        trial(lora={"rank": 3, "target_modules": ["mlp.up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 12}}),
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
        ({"lora": {"rank": 9}}, "its rank or its adapted layers exceed what the slots were built for"),
        ({"lora": {"rank": 9, "target_modules": ["v_proj"], "rank_pattern": {"v_proj": 8}}}, None),
        (
            {"lora": {"rank": 8, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 9}}},
            "its rank or its adapted layers exceed what the slots were built for",
        ),
        (
            {"lora": {"rank": 2, "target_modules": ["q_proj", "down_proj"]}},
            "its rank or its adapted layers exceed what the slots were built for",
        ),
        (
            {"training": {"adapter_dtype": "bfloat16"}},
            f"training.adapter_dtype {DIFFERS}",
        ),
        (
            {"training": {"optimizer": "paged_adamw_8bit"}},
            f"the precision of training.optimizer's moments {DIFFERS}",
        ),
        ({"training": {"optimizer": "paged_adamw_32bit"}}, None),
        ({"training": {"recompute": True}}, f"training.recompute {DIFFERS}"),
        (
            {"training": {"dequantize": "once"}},
            "training.dequantize differs from that of the trials that share the engine",
        ),
        (
            {"training": {"precision": "bf16"}},
            "training.precision differs from that of the trials that share the engine",
        ),
    ],
    ids=str,
)
def test_which_trials_cannot_share_an_engine(
    trial: MakeConfig, base: Any, sections: dict[str, Any], reason: str | None
) -> None:
    lora = {"rank": 8, "target_modules": ["q_proj", "v_proj"]}
    spec = EngineSpec.of(base, [trial(lora=lora), trial(lora=lora | {"rank": 4})], 4)
    assert spec.refuses(base, trial(**{"lora": lora} | sections)) == reason


def test_a_pass_holds_the_largest_batch_of_one_slot_or_average_batches_of_all(trial: MakeConfig, base: Any) -> None:
    rows = TokenizedRows(
        [[1] * length for length in (2, 2, 2, 2, 2, 50)], [[1] * length for length in (2, 2, 2, 2, 2, 50)]
    )
    configs = [trial(training={"batch_size": 1}), trial(training={"batch_size": 1, "accumulation": 2})]
    assert pass_tokens(EngineSpec.of(base, configs, 1), rows) == 52
    assert pass_tokens(EngineSpec.of(base, configs, 2), rows) == 52, "2 * 2 * 10 is less"
    assert pass_tokens(EngineSpec.of(base, configs, 4), rows) == int(1.1 * 4 * 2 * 10)


@pytest.mark.parametrize(("wanted", "batch_size", "slots"), [(8, 1, 8), (8, 4, 2), (1, 4, 1), (8, 16, 1)])
def test_a_cpu_takes_as_many_trials_as_keep_it_busy(
    trial: MakeConfig, base: Any, wanted: int, batch_size: int, slots: int
) -> None:
    rows = TokenizedRows([[1] * 64] * 100, [[1] * 64] * 100)
    count, reason = plan_slots(
        Target.here(base), base, [trial(training={"batch_size": batch_size})], rows, rows, wanted
    )
    assert count == slots
    assert reason == f"a batch has up to {64 * batch_size} tokens, and {CPU_FULL} tokens keep a core busy"
