"""A sweep that says only how many trials it wants: what is searched, in which order, and why."""

from pathlib import Path
from typing import Any

import pytest
from searched import by_age, decided

from orchestrator.deploy import open_sweep
from orchestrator.record import SweepPaths, TrialState, read_sweep
from orchestrator.spec import parse_spec
from orchestrator.spec.default_search import DEFAULT_SPACE
from orchestrator.spec.search import RATE
from orchestrator.sweep import resume_sweep, run_sweep
from orchestrator.sweep.search.factory import make_searcher

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

EXPERIMENT: dict[str, Any] = {
    "base": {"model": "embedded", "compute_dtype": "float32"},
    "data": {
        "source": "embedded", "format": "template", "template": "<s>[INST] {question} [/INST] {answer} </s>",
        "loss_on": "completion", "max_length": 64, "max_rows": 400, "held_out": {"count": 40},
    },
    "training": {"steps": 40, "eval_steps": 20},
    "search": {"num_trials": 6},
    "resources": {"max_concurrent": 1},
    "tracking": {"tensorboard": False, "wandb": {"mode": "disabled"}},
}  # fmt: skip


def test_a_number_of_trials_is_all_that_a_search_needs(tmp_path: Path) -> None:
    said: list[str] = []
    record = run_sweep(parse_spec(EXPERIMENT), SweepPaths(tmp_path / "sweep"), lambda _: None, say=said.append)
    trials = by_age(record)
    spec = record.info.spec
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    assert set(spec.search.space) == set(DEFAULT_SPACE) - {"training.batch_size"}
    rate = spec.search.prior[RATE]
    assert [trial.config.training.learning_rate for trial in trials[:3]] == pytest.approx([rate, 3 * rate, rate / 3])
    assert {trial.config.lora.rank for trial in trials[:3]} == {64}

    searcher = make_searcher(spec, max_concurrent=1)
    for i, trial in enumerate(trials):
        assert searcher.suggest(f"t{i}") == trial.config.varied, "the search has heard each trial's best evaluation"
        assert trial.best is not None
        searcher.on_trial_complete(f"t{i}", {"eval/loss": trial.best.value})

    chosen = decided(record, "chosen")
    assert [each.trial_id for each in chosen] == [trial.trial_id for trial in trials]
    assert chosen[0].why.startswith("begins at the prior")
    assert chosen[3].why.startswith("Gaussian process on 3 results expects eval/loss")
    assert [f"{each.trial_id}: {each.why}" for each in chosen] == [
        line for line in said if line[:5] in {t.trial_id[:5] for t in trials}
    ]
    assert any("learning rates begin around" in line for line in said)
    best = min(trials, key=lambda trial: trial.best.value if trial.best else float("inf"))
    assert best.best
    assert best.best.value < 2.0, "the demo's trials begin at 4 and end at 0.3 after 200 steps"


def test_finalists_run_again_and_the_winner_is_measured_and_a_resume_repeats_neither(tmp_path: Path) -> None:
    said: list[str] = []
    search = {"num_trials": 3, "repeats": 3, "space": {RATE: {"loguniform": [1e-4, 1e-2]}}}
    data = EXPERIMENT["data"] | {"test": {"count": 30}}
    spec = parse_spec(EXPERIMENT | {"data": data, "search": search, "resources": {"cpus_per_trial": 2}})
    record = run_sweep(spec, SweepPaths(tmp_path / "sweep"), lambda _: None, say=said.append)
    again = read_sweep(record.paths.repeats)
    assert len(again.trials()) == 2 * (len(again.info.spec.search.first) // 2) >= 4
    assert {trial.config.training.seed for trial in again.trials()} == {1, 2}
    assert any(line.startswith("the finalists run again with other seeds: ") for line in said)
    choice = open_sweep(record.paths.root).best().recommendation
    assert choice.leader.trial.trial_id in choice.over_seeds
    assert {len(values) for values in choice.over_seeds.values()} == {3}
    for name, values in choice.over_seeds.items():
        trial = next(trial for trial in record.trials() if trial.trial_id == name)
        assert trial.best is not None
        assert values[0] == trial.best.value
        assert len(set(values)) == 3, "seeds make a difference"

    best = open_sweep(record.paths.root).best()
    assert best.test_score is not None
    assert (len(best.test_score.scores.losses), record.info.num_test, record.info.num_held_out) == (30, 30, 40)
    assert best.test_score.scores.loss == pytest.approx(best.test_score.held_out["eval/loss"], rel=0.5)
    assert best.as_dict()["test"] == best.test_score.scores.values()
    measured = record.paths.test.stat().st_mtime_ns

    began = {trial.trial_id: trial.seconds for trial in again.trials()}
    resume_sweep(read_sweep(record.paths.root), lambda _: None)
    assert {trial.trial_id: trial.seconds for trial in read_sweep(record.paths.repeats).trials()} == began
    assert record.paths.test.stat().st_mtime_ns == measured, "the same winner is not measured again"
