"""A whole plan of the demo on a GPU that is not here, as data, as text and as JSON."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.errors import RequestError
from orchestrator.planning.disk import plan_disk
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.models import Measured, SweepPlan
from orchestrator.planning.probe import STEPS, retimed, short_trial
from orchestrator.planning.sweep_plan import extreme_corners, plan_sweep
from orchestrator.report.plan import say_plan, say_seconds
from orchestrator.spec import load_spec
from orchestrator.training.engines.check_targets import EmptyBases
from orchestrator.training.model.targets import expected_modules
from tests.unit.planning.conftest import MakeSpec

BF16 = "base.compute_dtype=bfloat16"


@pytest.fixture(scope="module")
def demo() -> SweepPlan:
    return plan_sweep(load_spec(DEMO, [BF16]), "demo.yaml", GPUS["h200"], 2, price=3.0)


def shown(plan: SweepPlan, width: int = 80) -> str:
    file = io.StringIO()
    say_plan(Console(file=file, width=width), plan)
    return file.getvalue()


def test_the_plan_of_the_demo(demo: SweepPlan) -> None:
    assert (demo.num_trials, demo.slots, demo.steps) == (8, 4, [200, 200])
    assert [corner.rank for corner in demo.corners] == [32, 16, 8, 4]
    assert (demo.rows.num_train, demo.rows.num_held_out, demo.rows.longest) == (1872, 128, 43)
    assert demo.tokens == pytest.approx(8 * 200 * 8 * 67636 / 1872, abs=1)
    assert demo.whole is not None
    assert demo.stopped is not None
    whole = demo.whole
    assert whole.total_s == pytest.approx(
        whole.start_s + whole.train_s + whole.evaluate_s + whole.answer_s + 3, abs=0.2
    )
    assert whole.gpu_hours == pytest.approx(2 * whole.total_s / 3600, rel=0.01)
    assert whole.price == pytest.approx(3 * whole.gpu_hours, abs=0.01)
    assert [round(each.tokens / whole.tokens, 2) for each in demo.stopped] == [0.47, 0.60]


def test_without_a_price_none_is_invented(demo: SweepPlan) -> None:
    plan = plan_sweep(load_spec(DEMO, [BF16]), "demo.yaml", GPUS["h200"])
    assert plan.whole is not None
    assert plan.whole.price is None
    assert "USD" not in shown(plan)
    assert "USD" in shown(demo)


def test_the_text_fits_into_80_columns(demo: SweepPlan) -> None:
    text = shown(demo)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("8 trials, 4 in memory at a time on each of 2 H200: ")
    assert " GPU hours, 0." in text
    assert "If forecast stops trials: " in text
    assert "rank 32, 8 rows" in text
    assert shown(demo.model_copy(update={"num_gpus": 1})).startswith("8 trials, 4 in memory at a time on an H200: ")


def test_corners_that_do_not_fit_are_said_first_and_refused(demo: SweepPlan) -> None:
    corners = [demo.corners[0].model_copy(update={"fits": False}), *demo.corners[1:]]
    text = shown(demo.model_copy(update={"corners": corners}), 160)
    assert "Memory: 1 of 4 corners cannot fit: lora.rank 32" in text


def test_on_a_cpu_memory_and_time_are_not_foreseen() -> None:
    plan = plan_sweep(load_spec(DEMO), "demo.yaml", None)
    assert (plan.whole, plan.corners, plan.num_gpus) == (None, [], 0)
    assert "times on a CPU are not foreseen; give --gpu or --probe" in shown(plan, 160)


def test_a_trial_that_trl_trains_leaves_the_time_open() -> None:
    plan = plan_sweep(load_spec(DEMO, [BF16, "lora.dora=true"]), "demo.yaml", GPUS["h200"])
    assert plan.whole is None
    text = shown(plan, 160)
    assert "times of trl are not foreseen" in text
    assert "the fast engine does not support lora.dora" in text


def test_rows_that_are_all_cut_are_warned_of() -> None:
    plan = plan_sweep(load_spec(DEMO, [BF16, "data.max_length=24", "data.truncate=left"]), "demo", GPUS["h200"])
    assert plan.rows.num_truncated == 2000
    assert any("data.max_length=24: all rows have more tokens (up to 43)" in each for each in plan.warnings)


def test_the_disk_is_that_of_what_is_kept(make_spec: MakeSpec) -> None:
    spec = make_spec(lora={"rank": 8}, training={"steps": 3})
    model, config = EmptyBases().of(spec.base), spec.trial_config({})
    adapter = 4 * 8 * sum(i + o for i, o in expected_modules(model, config.lora).values())
    disk = plan_disk(model, [config] * 5, 2, 1000)
    assert disk.data == 4_000  # two bytes for an id of the embedded base, and two for its label
    assert disk.adapters == 5 * adapter
    assert disk.checkpoints == 3 * 2 * 3 * adapter  # two that are kept and one being written; with two moments


def test_a_probe_trains_three_steps_of_the_corner() -> None:
    spec = load_spec(DEMO)
    config = spec.corners()[0]
    short = short_trial(spec, config)
    assert (short.training.steps, short.training.eval_steps, short.search.total_trials) == (STEPS, STEPS, 1)
    assert short.lora == config.lora
    assert not short.tracking.tensorboard
    assert short.evaluation.metrics == []


def measured(step_s: float) -> Measured:
    return Measured(device="H200", step_s=step_s, tokens_per_second=1000.0, peak_gib=1.5, engine="fast")


def test_measured_steps_replace_foreseen_ones(demo: SweepPlan) -> None:
    first, last = extreme_corners(demo.corners)
    assert (first.rank, last.rank) == (32, 4)
    corners = [
        each.model_copy(update={"measured": measured(2 * each.step_s)}) if each in (first, last) else each
        for each in demo.corners
        if each.step_s
    ]
    plan = retimed(demo.model_copy(update={"corners": corners}), 1)
    assert plan.whole is not None
    assert demo.whole is not None
    assert plan.whole.train_s == pytest.approx(2 * demo.whole.train_s, abs=0.1)
    assert plan.whole.start_s == demo.whole.start_s
    text = shown(plan)
    assert "1.5*" in text
    assert "* measured on this machine" in text


def test_measured_rates_give_a_time_where_none_is_foreseen(demo: SweepPlan) -> None:
    corner = demo.corners[0].model_copy(update={"measured": measured(0.1), "step_s": None})
    plan = demo.model_copy(update={"corners": [corner], "whole": None, "stopped": None, "num_gpus": 1})
    timed = retimed(plan, 1)
    assert timed.whole is not None
    assert timed.whole.train_s == pytest.approx(demo.tokens / 1000.0, abs=0.1)


@pytest.mark.parametrize(("seconds", "words"), [(66, "66 s"), (2460, "41 min"), (11520, "3.2 h")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert say_seconds(seconds) == words


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", str(DEMO), "--set", BF16, *arguments])


def test_the_command_prints_json(capfd: pytest.CaptureFixture[str]) -> None:
    done = run("--gpu", "h200", "--json")
    assert done.exit_code == 0, done.exception
    document = json.loads(capfd.readouterr().out)
    assert document["num_trials"] == 8
    assert SweepPlan.model_validate(document).device == "H200"


def test_the_command_refuses_what_cannot_be() -> None:
    assert "--probe measures on this machine" in str(run("--gpu", "h200", "--probe").exception)
    assert isinstance(run("--gpu", "b300").exception, RequestError)


def test_the_command_refuses_trials_that_cannot_fit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(GPUS, "l4", replace(GPUS["l4"], memory_gib=0.66))
    error = run("--gpu", "l4").exception
    assert isinstance(error, RequestError)
    assert "4 kinds of trials cannot fit into the memory of an L4, such as lora.rank 32" in error.message
    assert "Memory: 4 of 4 corners cannot fit" in capfd.readouterr().out
