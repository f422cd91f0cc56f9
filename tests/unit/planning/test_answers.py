"""The time and the memory of generated answers, as a plan counts them."""

from dataclasses import replace

import pytest

from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.planning.answers import LAYER_S, AnswerSize, num_rounds
from orchestrator.planning.gpus import GIB, GPUS
from orchestrator.planning.makespan import PackTimes
from orchestrator.planning.models import SweepPlan
from orchestrator.planning.sweep_plan import plan_sweep
from orchestrator.spec import load_spec
from orchestrator.training.fast.step.generation import CACHE_SHARE
from tests.unit.planning.conftest import MakeSpec
from tests.unit.planning.test_time import SIZE, pack

H200 = GPUS["h200"]
ANSWERS = AnswerSize(num_prompts=56, prompt_tokens=60.0, longest=100, new_tokens=32, at_evaluations=True)


def demo_plan(*overrides: str) -> SweepPlan:
    return plan_sweep(
        load_spec(DEMO, ["base.compute_dtype=bfloat16", "evaluation.max_new_tokens=400", *overrides]), "demo.yaml", H200
    )


def test_the_time_of_a_token_is_that_which_an_h200_measured() -> None:
    """docs/log.md, 2026-11-30: 112 prompts of two slots on 16 layers at 1.1B's width take 24 ms a token."""
    times = pack("1.1b")
    times = replace(times, shape=replace(times.shape, layers=16))
    more = replace(ANSWERS, new_tokens=132)
    a_token = (more.seconds(times, H200, 2) - ANSWERS.seconds(times, H200, 2)) / 100
    assert a_token == pytest.approx(0.024, rel=0.05)


def test_many_answers_take_longer_once_their_passes_fill_the_gpu() -> None:
    times: PackTimes = pack("7b")
    few, many = (replace(ANSWERS, num_prompts=number) for number in (8, 4000))
    launches = times.shape.layers * LAYER_S * 32
    assert few.seconds(times, H200, 1) == pytest.approx(launches, rel=0.05)
    assert many.seconds(times, H200, 4) > 2 * launches


def test_the_cache_has_a_share_of_the_memory_at_most() -> None:
    shape = pack("7b").shape
    a_token = 2 * shape.layers * shape.keys * shape.head_size * 2
    assert ANSWERS.cache_bytes(shape, H200, 1) == 56 * 132 * a_token
    most = replace(ANSWERS, num_prompts=100_000).cache_bytes(shape, H200, 4)
    assert most == pytest.approx(H200.memory_gib * GIB / CACHE_SHARE, rel=0.001)


def test_what_is_answered_follows_from_the_experiment(make_spec: MakeSpec) -> None:
    def answers(**search: str) -> AnswerSize | None:
        section = {"metrics": ["exact_match"], "rows": 3, "max_new_tokens": 7}
        return AnswerSize.of(make_spec(evaluation=section, search=search, training={"steps": 4}), [10, 20, 30, 99])

    after, at = answers(), answers(metric="eval/exact_match")
    assert after == AnswerSize(3, 20.0, 30, 7, at_evaluations=False)
    assert at == replace(ANSWERS, num_prompts=3, prompt_tokens=20.0, longest=30, new_tokens=7)
    assert AnswerSize.of(make_spec(training={"steps": 4}, evaluation={"metrics": []}), [10]) is None


def test_how_often_trials_answer() -> None:
    sizes = [replace(SIZE, evaluations=number) for number in (10, 4, 1)]
    assert num_rounds(ANSWERS, sizes, num_whole=1) == 15
    assert num_rounds(replace(ANSWERS, at_evaluations=False), sizes, num_whole=1) == 1


def test_a_plan_counts_answers() -> None:
    without, after, at = (
        demo_plan(*overrides)
        for overrides in (
            ["evaluation.metrics=[]"],
            ["evaluation.metrics=[exact_match]"],
            ["evaluation.metrics=[exact_match]", "search.metric=eval/exact_match", "scheduler.kind=none"],
        )
    )
    assert without.whole is not None
    assert after.whole is not None
    assert at.whole is not None
    assert without.whole.answer_s == 0
    assert at.whole.answer_s > 5 * after.whole.answer_s > 0, "at each evaluation, rather than once"
    assert after.whole.total_s - without.whole.total_s == pytest.approx(after.whole.answer_s, abs=0.2)
    assert after.stopped is not None
    assert after.stopped[0].answer_s < after.whole.answer_s, "stopped trials do not answer"
    assert any("keys and values take" in note for note in after.notes)
    assert not any("evaluation.metrics" in note for note in without.notes)
