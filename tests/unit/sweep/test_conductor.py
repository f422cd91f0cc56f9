"""Who is stopped, paused and cloned, when and why; and what is still known of it after a resume."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from orchestrator.record import TrialResult, TrialState
from orchestrator.spec import parse_spec
from orchestrator.spec.search import Budget
from orchestrator.sweep.schedulers.brackets import HyperBand
from orchestrator.sweep.schedulers.budget import BudgetTracker

ASHA = {"kind": "asha", "grace_steps": 10, "reduction_factor": 2}
MEDIAN = {"kind": "median", "grace_steps": 10, "min_trials": 2}
BAND = {"kind": "hyperband", "grace_steps": 10, "reduction_factor": 2}
PBT = {"kind": "pbt", "interval_steps": 10, "quantile": 0.5}

MakeStage = Callable[..., Any]


def falling(level: float) -> list[float]:
    """A trial of four evaluations, better the lower its level."""
    return [level + 0.4, level + 0.3, level + 0.2, level + 0.1]


def test_asha_stops_what_lies_below_the_best_half_of_a_rung(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA)
    stage.add(a=falling(0), b=falling(2), c=falling(1.1))
    stage.run()
    assert stage.decisions("stopped") == [("b", 10), ("c", 10)]
    assert stage.conductor.why_stopped("b") == (
        "asha: eval/loss 2.4 at step 10 is not among the best 1 in 2 that have come to its rung"
    )
    assert stage.conductor.why_stopped("a") is None


@pytest.mark.parametrize("scheduler", [ASHA, {"kind": "asha", "grace_tokens": 70, "reduction_factor": 2}])
def test_time_is_steps_or_tokens(scheduler: dict[str, Any], make_stage: MakeStage) -> None:
    stage = make_stage(scheduler)
    stage.add(a=falling(0), b=[0.3, 9, 9, 9])
    stage.run()
    assert stage.decisions("stopped") == [("b", 20)], "a rung at 10 steps of 7 tokens, another at twice as much"


def test_tokens_are_no_steps(make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "asha", "grace_tokens": 200, "reduction_factor": 2})
    stage.add(a=falling(0), b=[0.3, 9, 9, 9])
    stage.run()
    assert stage.decisions("stopped") == [("b", 30)], "the first evaluation past 200 tokens is that of 30 steps"


def test_a_rung_that_was_jumped_over_stays_empty(make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "asha", "grace_tokens": 10, "reduction_factor": 3})
    stage.add(a=falling(0))
    stage.run()
    (bracket,) = stage.conductor._inner._brackets
    filled = {rung: -score["a"] for rung, score in bracket._rungs if score}
    assert filled == pytest.approx({30: 0.4, 90: 0.3, 270: 0.1}), "evaluations at 70, 140, 210 and 280 tokens"


def test_a_long_trial_is_never_cut_by_the_scheduler_alone(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA)
    stage.add(long=[1.0] * 40)
    stage.run()
    assert stage.decisions("stopped") == []


def test_the_median_rule_compares_with_the_others_means(make_stage: MakeStage) -> None:
    stage = make_stage(MEDIAN)
    stage.add(a=falling(0), b=falling(1), c=falling(5))
    stage.run()
    assert stage.decisions("stopped") == [("c", 10)]
    assert "worse than the median" in stage.conductor.why_stopped("c")


@pytest.mark.parametrize("scheduler", [ASHA, MEDIAN], ids=["asha", "median"])
def test_what_lies_behind_is_stopped_after_a_resume_too(scheduler: dict[str, Any], make_stage: MakeStage) -> None:
    stage = make_stage(scheduler)
    stage.add(a=falling(0), b=falling(0.01), c=falling(0.02))
    stage.run()
    stage.resume(stage.conductor.state())
    stage.add(behind=falling(3))
    stage.run()
    assert ("behind", 10) in stage.decisions("stopped")


def test_without_a_memory_the_first_report_passes(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA)
    stage.add(a=falling(0), b=falling(0.01))
    stage.run()
    stage.resume(None)
    stage.add(behind=falling(3))
    stage.run()
    assert ("behind", 10) not in stage.decisions("stopped")


@pytest.mark.parametrize("scheduler", [ASHA, MEDIAN], ids=["asha", "median"])
def test_who_is_stopped_depends_on_no_order_of_reports(scheduler: dict[str, Any], make_stage: MakeStage) -> None:
    """Eight trials over three slots, some of which would pass if they reported first; one fails, one is short."""
    losses = {f"t{i}": falling(level) for i, level in enumerate([4, 2, 3, 1, 5, 0.5, 6, 0.2])}
    losses |= {"t2": [3.4, math.nan], "t3": [1.4]}
    found = []
    for seed in range(20):
        stage = make_stage(scheduler, num_slots=3, is_patient=True, num_trials=8)
        stage.draw = random.Random(seed)
        stage.to_come = dict(losses)
        stage.run()
        found.append(stage.all_decisions())
    assert len(found[0]) >= 2
    assert all(each == found[0] for each in found)
    assert {each.action for each in found[0]} == {"stopped"}, "no trial is paused for another"


def test_an_end_lets_the_reports_that_waited_for_it_be_heard(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA, num_slots=2, is_patient=True, num_trials=2)
    stage.add(a=[0.4, 0.3], b=falling(0.01))
    for trial in stage.trials:
        trial.set_status(Trial.RUNNING)
    for name in ("a", "b", "b"):
        stage.report(stage.trial(name))
    assert stage._idle == {"b"}
    stage.report(stage.trial("a"))
    assert stage.trial("a").is_finished()
    stage.run()
    assert all(trial.is_finished() for trial in stage.trials)


@pytest.mark.parametrize("ends_last", [False, True])
def test_an_end_that_waited_is_heard_after_a_resume(make_stage: MakeStage, ends_last: bool) -> None:
    stage = make_stage(ASHA | {"grace_steps": 20}, num_slots=2, is_patient=True, num_trials=2)
    losses = {"a": [0.4, 0.3], "b": falling(0.01)}
    stage.add(**dict(reversed(losses.items()) if ends_last else losses))
    for trial in stage.trials:
        trial.set_status(Trial.RUNNING)
    for name in ("a", "b", "a"):
        stage.report(stage.trial(name))
    assert stage.trial("a").is_finished()
    assert stage.conductor._reports._order.is_running("a")
    stage.resume(stage.conductor.state())
    stage.trial("b").set_status(Trial.RUNNING)
    stage.report(stage.trial("b"))
    stage.ask()
    assert not stage.conductor._reports._order.is_running("a")
    (bracket,) = stage.conductor._inner._brackets
    assert dict(bracket._rungs)[20]["a"] == -0.3


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


def test_a_report_that_waits_is_heard_again_after_a_resume(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA, num_slots=2, is_patient=True, num_trials=2)
    stage.add(a=falling(0), b=falling(2))
    for trial in stage.trials:
        trial.set_status(Trial.RUNNING)
    stage.report(stage.trial("b"))
    assert stage.decisions("stopped") == []
    stage.resume(stage.conductor.state())
    for name in ("a", "b"):
        stage.trial(name).update_last_result({})
        stage.trial(name).set_status(Trial.RUNNING)
        stage._idle.discard(name)
    stage.report(stage.trial("b"))
    assert stage.decisions("stopped") == []
    stage.report(stage.trial("a"))
    assert stage.decisions("stopped") == [("b", 10)]
    assert stage.trial("b").is_finished()


def test_a_report_of_a_trial_whose_worker_is_lost_keeps_nobody_waiting(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA, num_slots=2, is_patient=True, num_trials=2)
    stage.add(a=falling(0), b=falling(2))
    for trial in stage.trials:
        trial.set_status(Trial.RUNNING)
    stage.report(stage.trial("b"))
    stage._idle.discard("b")
    stage.lose(stage.trial("b"))
    stage.trial("b").update_last_result({})
    stage.run()
    assert ("b", 10) in stage.decisions("stopped")


def test_a_step_is_counted_once(make_stage: MakeStage) -> None:
    stage = make_stage(MEDIAN)
    stage.add(a=falling(0))
    trial = stage.trial("a")
    trial.set_status(Trial.RUNNING)
    stage.report(trial)
    again = {"step": 10, "tokens": 70, "eval/loss": 99.0, "training_iteration": 2}
    assert stage.conductor.on_trial_result(stage, trial, again) == TrialScheduler.CONTINUE
    stage.report(trial)
    (results,) = stage.conductor._inner._results.values()
    assert [result["step"] for result in results] == [10, 20]


def band() -> dict[str, list[float]]:
    """One of each bracket: trials 0 to 2 run to their end, 3 to 5 meet a rung at 20 steps, 6 to 9 one at 10 as well."""
    levels = [5, 6, 7, 3, 1, 2, 0.5, 0.2, 9, 8]
    return {f"t{i}": falling(level) for i, level in enumerate(levels)}


@pytest.mark.parametrize("num_slots", [1, 2, 3, 10])
def test_brackets_are_whole_however_few_slots_there_are(num_slots: int, make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=num_slots, num_trials=10)
    stage.add(**band())
    assert [trial.status for trial in stage.trials] == ["PAUSED"] * 10, "all are there before the first has reported"
    stage.run()
    assert sorted(stage.decisions("stopped")) == [("t3", 20), ("t6", 20), ("t8", 10), ("t9", 10)]
    resumed = set(stage.decisions("resumed"))
    assert resumed <= {("t4", 20), ("t5", 20), ("t6", 10), ("t7", 10), ("t7", 20)}
    assert set(stage.decisions("paused")) >= resumed
    assert not [path for path in stage.paths.root.glob("trials/*/.paused") if path.parent.name not in ("t3", "t8")]
    assert all(trial.status == Trial.TERMINATED for trial in stage.trials)


def test_who_passes_the_last_rung_runs_to_its_own_end(make_stage: MakeStage) -> None:
    stage = make_stage(BAND | {"max_steps": 20}, num_trials=4)
    stage.add(a=falling(1), b=falling(2), c=falling(4), d=falling(3))  # two without a rung, two with one at 10 steps
    stage.run()
    assert stage.decisions("stopped") == [("c", 10)]
    assert [stage.trial(name).last_result["step"] for name in "abcd"] == [40, 40, 10, 40]


def test_no_more_trials_run_than_have_a_slot(make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=2, num_trials=10)
    stage.add(**band())
    for _ in range(200):
        stage.run(turns=1)
        assert sum(trial.status == Trial.RUNNING for trial in stage.trials) <= 2


@pytest.mark.parametrize("at_turn", range(1, 40, 6))
def test_brackets_go_on_after_a_resume_as_they_would_have(at_turn: int, make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=2, num_trials=10)
    stage.add(**band())
    stage.run(at_turn)
    state, before = stage.conductor.state(), stage.all_decisions()
    stage.resume(state)
    assert stage.all_decisions() == before
    stage.run()
    assert sorted(stage.decisions("stopped")) == [("t3", 20), ("t6", 20), ("t8", 10), ("t9", 10)]


def test_decisions_past_the_last_state_are_made_again_and_told_once(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA)
    stage.add(a=falling(0), b=falling(2))
    state = stage.conductor.state()
    stage.run()
    assert stage.decisions("stopped") == [("b", 10)]
    for trial in stage.trials:  # as Tune restores them from a state of before
        trial.set_status(Trial.PENDING)
        trial.run_metadata.last_result = {}
    stage.resume(state)
    assert stage.decisions("stopped") == []
    stage.run()
    assert stage.decisions("stopped") == [("b", 10)]


@pytest.mark.parametrize("kind", ["hyperband", "bohb"])
def test_a_trial_that_fails_keeps_nobody_waiting(kind: str, make_stage: MakeStage) -> None:
    """In Tune's own HyperBand those that wait for it after the first rung would wait for ever."""
    algorithm = "bohb" if kind == "bohb" else "random"
    stage = make_stage(BAND | {"kind": kind}, num_slots=10, num_trials=10, algorithm=algorithm)
    losses = band()
    losses["t7"][1] = losses["t0"][1] = math.nan
    stage.add(**losses)
    stage.run()
    assert stage.trial("t7").status == Trial.ERROR
    assert {trial.status for trial in stage.trials} == {Trial.ERROR, Trial.TERMINATED}


def test_tunes_own_hyperband_would_wait_for_ever(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `HyperBand` is for: once Tune does better, it can go."""
    monkeypatch.delattr(HyperBand, "_process_bracket")
    stage = make_stage(BAND, num_slots=10, num_trials=10)
    losses = band()
    losses["t7"][1] = math.nan
    stage.add(**losses)
    monkeypatch.setattr("orchestrator.sweep.schedulers.conductor._STUCK_S", 0.0)
    with pytest.raises(TuneError, match="scheduler hyperband lets t6 wait, and no trial trains"):
        stage.run()


def test_bohb_hears_of_every_rung_and_of_the_end(make_stage: MakeStage) -> None:
    stage = make_stage(BAND | {"kind": "bohb"}, num_slots=10, num_trials=4, algorithm="bohb")
    stage.add(a=falling(0), b=falling(1), c=falling(2), d=falling(3))  # the largest bracket: rungs at 10 and 20 steps
    stage.run()
    assert sorted(stage.decisions("stopped")) == [("b", 20), ("c", 10), ("d", 10)]
    # Of what goes on Tune tells the searcher itself, with what the scheduler has left in the report.
    assert {(name, budget) for name, _, budget in stage.told} == {("d", 1), ("b", 2), ("a", 4)}


def test_bohb_puts_new_trials_into_brackets_of_their_own(make_stage: MakeStage) -> None:
    """In Tune's own they would join the last one, whose trials have ended, and meet no rung."""
    stage = make_stage(BAND | {"kind": "bohb"}, num_slots=1, num_trials=20, algorithm="bohb")
    stage.to_come = {f"t{i:02}": falling(i) for i in range(14)}
    stage.run()
    brackets = [bracket for each in stage.conductor._inner._hyperbands for bracket in each]
    assert [len(bracket._all_trials) for bracket in brackets][:4] == [4, 3, 3, 4]
    assert [name for name, _ in stage.decisions("stopped")][:2] == ["t02", "t03"]


def population(make_stage: MakeStage, scheduler: dict[str, Any] = PBT, seed: int = 0) -> Any:
    """Four trials on two slots, two of which are far behind; at the ends of the range."""
    stage = make_stage(scheduler, num_slots=2, num_trials=4, seed=seed)
    stage._schedule_trial_save = lambda _, result=None: Saved(result)
    stage.add(a=falling(0), b=falling(1), c=falling(8), d=falling(9))
    for name, rate in {"a": 9e-2, "b": 2e-5, "c": 1e-3, "d": 1e-4}.items():
        stage.trial(name).config["training.learning_rate"] = rate
    return stage


def rates(stage: Any) -> dict[str, float]:
    return {trial.trial_id: trial.config["training.learning_rate"] for trial in stage.trials}


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_a_population_takes_turns_and_the_worst_are_cloned(kind: str, make_stage: MakeStage) -> None:
    scheduler = {name: value for name, value in PBT.items() if name != "kind"} | {"kind": kind}
    for seed in range(5):
        stage = population(make_stage, scheduler, seed)
        stage.run()
        cloned = [each for each in stage.all_decisions() if each.action == "cloned"]
        assert {each.trial_id for each in cloned} == {"c", "d"}
        for each in cloned:
            assert each.donor in ("a", "b")
            assert f"is among the worst 50% of the trials, that of {each.donor} among the best: from its" in each.why
        assert stage.decisions("paused"), "four take turns on two slots"
        assert all(1e-5 <= rate <= 1e-1 for rate in rates(stage).values()), "within the range"
        assert (rates(stage)["a"], rates(stage)["b"]) == (9e-2, 2e-5), "the best stay as they are"
        assert rates(stage)["c"] != 1e-3
        assert rates(stage)["d"] != 1e-4
        assert {trial.status for trial in stage.trials} == {Trial.TERMINATED}


def test_a_population_is_repeated_by_its_seed(make_stage: MakeStage) -> None:
    found = []
    for seed, outside in ((1, 5), (1, 6), (2, 5)):
        random.seed(outside)
        np.random.seed(outside)
        stage = population(make_stage, seed=seed)
        stage.run()
        found.append(rates(stage))
    assert found[0] == found[1] != found[2]


def test_a_clone_of_an_earlier_step_is_heard_again_from_there_on(make_stage: MakeStage) -> None:
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


def test_pb2_sees_rates_by_their_logarithm(make_stage: MakeStage) -> None:
    stage = population(make_stage, {"kind": "pb2", "interval_steps": 10, "quantile": 0.5})
    stage.run()
    seen = stage.conductor._inner.data["training.learning_rate"]
    assert math.log(2e-5) in seen.to_list()
    assert seen.between(math.log(1e-5), math.log(1e-1)).all()


def test_pb2_draws_what_it_cannot_learn_yet(make_stage: MakeStage) -> None:
    """A donor has reported once: its gain is not known, and a clone with its values would be a second donor."""
    found = set()
    for seed in range(5):
        stage = population(make_stage, {"kind": "pb2", "interval_steps": 10, "quantile": 0.5}, seed)
        for name in "cdabcd":
            stage.trial(name).set_status(Trial.RUNNING)
            stage.report(stage.trial(name))
        assert {each.trial_id for each in stage.all_decisions() if each.action == "cloned"} == {"c", "d"}
        drawn = [rates(stage)[name] for name in "cd"]
        chosen = stage.conductor._inner.current[:, 0]
        assert chosen == pytest.approx([math.log(rate) for rate in drawn]), "a choice knows of those of its round"
        found |= set(drawn)
        clone, drawn_at = stage.trial("c"), math.log(rates(stage)["c"])
        clone.set_status(Trial.RUNNING)
        stage.report(clone)
        data = stage.conductor._inner.data
        begun, reported = data[
            (data["Trial"] == str(clone)) & (data["training.learning_rate"] == drawn_at)
        ].itertuples()
        assert (begun.Time, reported.Time) == (10, 30), "its gain from the donor's report on is known"
    assert len(found) == 10
    assert not found & {9e-2, 2e-5}
    assert all(1e-5 <= rate <= 1e-1 for rate in found)
    assert min(found) < 1e-3, "by the logarithm"


@pytest.mark.parametrize("at_turn", range(1, 20, 3))
def test_a_population_goes_on_after_a_resume(at_turn: int, make_stage: MakeStage) -> None:
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
    """A checkpoint of a trial, at once."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.metrics = result
        self.checkpoint = self


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"tokens": 200}, "the budget is spent: 210 of 200 tokens"),
        ({"gpu_hours": 25 / 3600}, "the budget is spent: 0.008333 of 0.006944 GPU-hours"),
    ],
)
def test_a_budget_that_is_spent_ends_the_sweep(budget: dict[str, Any], said: str, make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "none"}, num_slots=2, num_trials=4, budget=budget)
    stage.add(a=falling(0), b=falling(1))
    stage.run(turns=3)
    assert stage.is_search_over
    stage.add(late=falling(2))  # had been made in the same moment
    stage.run()
    assert set(stage.decisions("stopped")) == {("a", 20), ("b", 20)}
    assert "step" not in stage.trial("late").last_result, "it was never begun"
    assert stage.conductor.why_stopped("a") == said
    assert said == str(stage.conductor._record.budget_spent())


def test_a_budget_ends_what_waits_too(make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=2, num_trials=10, budget={"tokens": 1000})
    stage.add(**band())
    stage.run()
    spent = {each.trial_id for each in stage.all_decisions() if each.why.startswith("the budget is spent")}
    assert spent, "some had begun"
    assert all(trial.status == Trial.TERMINATED for trial in stage.trials)
    assert not list(stage.paths.root.glob("trials/*/.paused"))


@pytest.mark.parametrize("tokens", [280, 560, 840, 1120])
@pytest.mark.parametrize("kind", ["hyperband", "bohb"])
def test_once_the_budget_is_spent_the_scheduler_decides_nothing(kind: str, tokens: int, make_stage: MakeStage) -> None:
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


def test_a_budget_counts_on_after_a_resume(make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "none"}, num_slots=1, num_trials=2, budget={"tokens": 400})
    stage.add(a=falling(0))
    stage.run()
    stage.resume(stage.conductor.state())
    stage.add(b=falling(1))
    stage.run()
    assert stage.decisions("stopped") == [("b", 20)], "280 tokens of the first, 140 of the second"


def test_the_clock_runs_from_the_first_step_and_stands_between_two_drivers(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("orchestrator.sweep.schedulers.budget.time.monotonic", lambda: clock[0])
    stage = make_stage({"kind": "none"}, num_slots=1, num_trials=2, budget={"wall_clock_hours": 1.0})

    def is_over(at: float) -> bool:
        clock[0] = at
        return stage.conductor._check_budget(stage) is not None

    stage.add(a=falling(0))
    assert not is_over(0.0), "its worker loads"
    assert not is_over(5000.0)
    stage.paths.first_step.touch()
    assert not is_over(5000.0)
    assert not is_over(8000.0), "3000 s"
    state = stage.conductor.state()
    stage.resume(state)
    assert not is_over(12000.0), "the new driver's worker loads"
    assert not is_over(20000.0)
    stage.paths.first_step.touch()
    assert not is_over(20000.0)
    assert not is_over(20599.0)
    clock[0] = 20601.0
    stage.run()
    assert stage.conductor._record.budget_spent().limit == "wall_clock_hours"


def test_tokens_of_a_donor_are_spent_once(document: dict[str, Any]) -> None:
    config = parse_spec(document).trial_config({})
    budget = BudgetTracker(Budget(tokens=100))
    shared: dict[str, Any] = {"state": TrialState.RUNNING, "config": config, "metric": "eval/loss", "mode": "min"}
    budget.count(TrialResult(trial_id="donor", tokens=60, **shared))
    clone = TrialResult(trial_id="clone", tokens=60, adopted_tokens=40, **shared)
    budget.count(clone)
    assert budget.spent() is None, "20 of its own"
    budget.count(clone.model_copy(update={"tokens": 80}))
    over = budget.spent()
    assert over is not None
    assert over.spent == 100
