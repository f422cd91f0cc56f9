"""Populations: the worst trials continue from the state of the best, with other values."""

import math
import random
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from simulated import PBT, MakeStage, falling


def population(make_stage: MakeStage, scheduler: dict[str, Any] = PBT, seed: int = 0) -> Any:
    """Return a stage with four trials on two slots. Two are far behind; the rates are near the ends of the range."""
    stage = make_stage(scheduler, num_slots=2, num_trials=4, seed=seed)
    stage._schedule_trial_save = lambda _, result=None: Saved(result)
    stage.add(a=falling(0), b=falling(1), c=falling(8), d=falling(9))
    for name, rate in {"a": 9e-2, "b": 2e-5, "c": 1e-3, "d": 1e-4}.items():
        stage.trial(name).config["training.learning_rate"] = rate
    return stage


def rates(stage: Any) -> dict[str, float]:
    return {trial.trial_id: trial.config["training.learning_rate"] for trial in stage.trials}


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_the_worst_trials_of_a_population_become_clones(kind: str, make_stage: MakeStage) -> None:
    scheduler = {name: value for name, value in PBT.items() if name != "kind"} | {"kind": kind}
    for seed in range(5):
        stage = population(make_stage, scheduler, seed)
        stage.run()
        cloned = [each for each in stage.all_decisions() if each.action == "cloned"]
        assert {each.trial_id for each in cloned} == {"c", "d"}
        for each in cloned:
            assert each.donor in ("a", "b")
            assert f"is among the worst 50% of the trials, that of {each.donor} among the best: from its" in each.why
        assert stage.decisions("paused"), "four trials take turns on two slots"
        assert all(1e-5 <= rate <= 1e-1 for rate in rates(stage).values()), "within the range"
        assert (rates(stage)["a"], rates(stage)["b"]) == (9e-2, 2e-5), "the best trials keep their values"
        assert rates(stage)["c"] != 1e-3
        assert rates(stage)["d"] != 1e-4
        assert {trial.status for trial in stage.trials} == {Trial.TERMINATED}


def test_a_seed_reproduces_a_population(make_stage: MakeStage) -> None:
    found = []
    for seed, outside in ((1, 5), (1, 6), (2, 5)):
        random.seed(outside)
        np.random.seed(outside)
        stage = population(make_stage, seed=seed)
        stage.run()
        found.append(rates(stage))
    assert found[0] == found[1] != found[2]


def test_reports_of_a_clone_count_from_the_step_of_its_donor(make_stage: MakeStage) -> None:
    stage = population(make_stage)
    for name in "cabc":
        stage.trial(name).set_status(Trial.RUNNING)
        stage.report(stage.trial(name))
    (clone,) = [each for each in stage.all_decisions() if each.action == "cloned"]
    assert (clone.trial_id, clone.step) == ("c", 20)
    assert "from its step 10 on" in clone.why
    trial = stage.trial("c")
    trial.set_status(Trial.RUNNING)
    stage.conductor.on_trial_result(stage, trial, {"step": 20, "tokens": 140, "eval/loss": 0.1})
    assert stage.conductor._inner._trial_state[trial].last_score == -0.1


def test_pb2_sees_the_logarithm_of_learning_rates(make_stage: MakeStage) -> None:
    stage = population(make_stage, {"kind": "pb2", "interval_steps": 10, "quantile": 0.5})
    stage.run()
    seen = stage.conductor._inner.data["training.learning_rate"]
    assert math.log(2e-5) in seen.to_list()
    assert seen.between(math.log(1e-5), math.log(1e-1)).all()


def test_pb2_draws_values_while_it_cannot_learn(make_stage: MakeStage) -> None:
    """A donor has reported once: its gain is unknown, and a clone with its values would be a copy of it."""
    found = set()
    for seed in range(5):
        stage = population(make_stage, {"kind": "pb2", "interval_steps": 10, "quantile": 0.5}, seed)
        for name in "cdabcd":
            stage.trial(name).set_status(Trial.RUNNING)
            stage.report(stage.trial(name))
        assert {each.trial_id for each in stage.all_decisions() if each.action == "cloned"} == {"c", "d"}
        drawn = [rates(stage)[name] for name in "cd"]
        chosen = stage.conductor._inner.current[:, 0]
        assert chosen == pytest.approx([math.log(rate) for rate in drawn]), (
            "a choice knows the points that were drawn in its round"
        )
        found |= set(drawn)
        clone, drawn_at = stage.trial("c"), math.log(rates(stage)["c"])
        clone.set_status(Trial.RUNNING)
        stage.report(clone)
        data = stage.conductor._inner.data
        begun, reported = data[
            (data["Trial"] == str(clone)) & (data["training.learning_rate"] == drawn_at)
        ].itertuples()
        assert (begun.Time, reported.Time) == (10, 30), "its gain since the donor's report is known"
    assert len(found) == 10
    assert not found & {9e-2, 2e-5}
    assert all(1e-5 <= rate <= 1e-1 for rate in found)
    assert min(found) < 1e-3, "rates are drawn by the logarithm"


@pytest.mark.parametrize("at_turn", range(1, 20, 3))
def test_a_population_continues_after_a_resume(at_turn: int, make_stage: MakeStage) -> None:
    stage = population(make_stage)
    stage.run(at_turn)
    before = stage.all_decisions()
    stage.resume(stage.conductor.state())
    assert stage.all_decisions() == before
    stage.run()
    assert {trial.status for trial in stage.trials} == {Trial.TERMINATED}
    assert set(stage.decisions("paused")) >= {("a", 10), ("b", 10)}
    assert all(each.donor in ("a", "b") for each in stage.all_decisions() if each.action == "cloned")


class Saved:
    """A checkpoint that is complete at once."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.metrics = result
        self.checkpoint = self
