"""Budgets: what they count, and how they end a sweep."""

from typing import Any

import pytest
from ray.tune.experiment import Trial
from simulated import ASHA, BAND, MakeStage, band, falling

from orchestrator.record import TrialResult, TrialState
from orchestrator.spec import parse_spec
from orchestrator.spec.search import Budget
from orchestrator.sweep.schedulers.budget import BudgetTracker


def test_a_spent_budget_stops_trials_whose_reports_wait(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA, num_slots=2, is_patient=True, num_trials=2, budget={"tokens": 105})
    stage.add(a=falling(0), b=falling(0))
    for trial in stage.trials:
        trial.set_status(Trial.RUNNING)
    stage.report(stage.trial("a"))
    assert stage._idle == {"a"}
    stage.report(stage.trial("b"))
    stage.ask()
    assert all(trial.is_finished() for trial in stage.trials)
    assert all(each.why.startswith("the budget is spent") for each in stage.all_decisions())


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"tokens": 200}, "the budget is spent: 210 of 200 tokens"),
        ({"gpu_hours": 25 / 3600}, "the budget is spent: 0.008333 of 0.006944 GPU-hours"),
    ],
)
def test_a_spent_budget_ends_the_sweep(budget: dict[str, Any], said: str, make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "none"}, num_slots=2, num_trials=4, budget=budget)
    stage.add(a=falling(0), b=falling(1))
    stage.run(turns=3)
    assert stage.is_search_over
    stage.add(late=falling(2))  # made just before the budget was spent
    stage.run()
    assert set(stage.decisions("stopped")) == {("a", 20), ("b", 20)}
    assert "step" not in stage.trial("late").last_result, "it never started"
    assert stage.conductor.why_stopped("a") == said
    assert said == str(stage.conductor._record.budget_spent())


def test_a_spent_budget_ends_waiting_trials_too(make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=2, num_trials=10, budget={"tokens": 1000})
    stage.add(**band())
    stage.run()
    spent = {each.trial_id for each in stage.all_decisions() if each.why.startswith("the budget is spent")}
    assert spent, "some trials had started"
    assert all(trial.status == Trial.TERMINATED for trial in stage.trials)
    assert not list(stage.paths.root.glob("trials/*/.paused"))


@pytest.mark.parametrize("tokens", [280, 560, 840, 1120])
@pytest.mark.parametrize("kind", ["hyperband", "bohb"])
def test_the_scheduler_decides_nothing_once_the_budget_is_spent(kind: str, tokens: int, make_stage: MakeStage) -> None:
    stage = make_stage(
        BAND | {"kind": kind}, num_slots=10, num_trials=10, budget={"tokens": tokens},
        algorithm="bohb" if kind == "bohb" else "random",
    )  # fmt: skip
    levels = [0.5, 0.2, 9, 8, 3, 1, 2, 5, 6, 7]
    stage.add(**(band() if kind == "hyperband" else {f"t{i}": falling(level) for i, level in enumerate(levels)}))
    stage.run()
    said = [each.why for each in stage.all_decisions() if each.action == "stopped"]
    first = next(place for place, why in enumerate(said) if why.startswith("the budget is spent"))
    assert all(why.startswith("the budget is spent") for why in said[first:])


def test_a_budget_continues_to_count_after_a_resume(make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "none"}, num_slots=1, num_trials=2, budget={"tokens": 400})
    stage.add(a=falling(0))
    stage.run()
    stage.resume(stage.conductor.state())
    stage.add(b=falling(1))
    stage.run()
    assert stage.decisions("stopped") == [("b", 20)], "the first has 280 tokens, the second 140"


def test_the_clock_starts_at_the_first_step_and_stops_between_two_drivers(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("orchestrator.sweep.schedulers.budget.time.monotonic", lambda: clock[0])
    stage = make_stage({"kind": "none"}, num_slots=1, num_trials=2, budget={"wall_clock_hours": 1.0})

    def is_over(at: float) -> bool:
        clock[0] = at
        return stage.conductor._check_budget(stage) is not None

    stage.add(a=falling(0))
    assert not is_over(0.0), "its worker is loading"
    assert not is_over(5000.0)
    stage.paths.first_step.touch()
    assert not is_over(5000.0)
    assert not is_over(8000.0), "3000 s have passed"
    state = stage.conductor.state()
    stage.resume(state)
    assert not is_over(12000.0), "the worker of the new driver is loading"
    assert not is_over(20000.0)
    stage.paths.first_step.touch()
    assert not is_over(20000.0)
    assert not is_over(20599.0)
    clock[0] = 20601.0
    stage.run()
    assert stage.conductor._record.budget_spent().limit == "wall_clock_hours"


def test_tokens_of_a_donor_count_once(document: dict[str, Any]) -> None:
    config = parse_spec(document).trial_config({})
    budget = BudgetTracker(Budget(tokens=100))
    shared: dict[str, Any] = {"state": TrialState.RUNNING, "config": config, "metric": "eval/loss", "mode": "min"}
    budget.count(TrialResult(trial_id="donor", tokens=60, **shared))
    clone = TrialResult(trial_id="clone", tokens=60, adopted_tokens=40, **shared)
    budget.count(clone)
    assert budget.spent() is None, "the clone has 20 tokens of its own"
    budget.count(clone.model_copy(update={"tokens": 80}))
    over = budget.spent()
    assert over is not None
    assert over.spent == 100
