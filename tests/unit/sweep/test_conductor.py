"""ASHA and the median rule under the conductor: which trials are stopped and why, the order of reports, and resumes."""

import math
import random
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from simulated import ASHA, MEDIAN, MakeStage, falling


def test_asha_stops_trials_below_the_best_half_of_a_rung(make_stage: MakeStage) -> None:
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


def test_a_grace_period_in_tokens_is_not_one_in_steps(make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "asha", "grace_tokens": 200, "reduction_factor": 2})
    stage.add(a=falling(0), b=[0.3, 9, 9, 9])
    stage.run()
    assert stage.decisions("stopped") == [("b", 30)], "the first evaluation past 200 tokens is the one at 30 steps"


def test_a_skipped_rung_stays_empty(make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "asha", "grace_tokens": 10, "reduction_factor": 3})
    stage.add(a=falling(0))
    stage.run()
    filled = {rung: scores["a"] for rung, scores in stage.conductor._inner.rungs.items()}
    assert filled == pytest.approx({30: 0.4, 90: 0.3, 270: 0.1}), "evaluations at 70, 140, 210 and 280 tokens"


def test_the_scheduler_does_not_limit_the_length_of_a_trial(make_stage: MakeStage) -> None:
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
def test_a_bad_trial_is_stopped_after_a_resume_too(scheduler: dict[str, Any], make_stage: MakeStage) -> None:
    stage = make_stage(scheduler)
    stage.add(a=falling(0), b=falling(0.01), c=falling(0.02))
    stage.run()
    stage.resume(stage.conductor.state())
    stage.add(behind=falling(3))
    stage.run()
    assert ("behind", 10) in stage.decisions("stopped")


def test_the_state_of_another_class_is_dropped(make_stage: MakeStage) -> None:
    """Earlier versions saved Tune's own scheduler."""
    stage = make_stage(ASHA)
    stage.add(a=falling(0))
    stage.run()
    rule = stage.conductor._inner
    rule.take_over(AsyncHyperBandScheduler())
    assert [*rule.heard] == ["a"]
    other = type(rule)(stage.conductor._spec, 9)
    other.take_over(rule)
    assert other.rungs == rule.rungs
    assert other._num_rows == 9


def test_without_saved_state_the_first_report_passes(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA)
    stage.add(a=falling(0), b=falling(0.01))
    stage.run()
    stage.resume(None)
    stage.add(behind=falling(3))
    stage.run()
    assert ("behind", 10) not in stage.decisions("stopped")


@pytest.mark.parametrize("scheduler", [ASHA, MEDIAN], ids=["asha", "median"])
def test_decisions_do_not_depend_on_the_order_of_reports(scheduler: dict[str, Any], make_stage: MakeStage) -> None:
    """Eight trials on three slots. Some would pass if they reported first; one fails, one is short."""
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
    assert {each.action for each in found[0]} == {"stopped"}, "no trial is paused to wait for another"


def test_the_end_of_a_trial_releases_reports_that_wait_for_it(make_stage: MakeStage) -> None:
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
def test_an_end_that_waited_is_processed_after_a_resume(make_stage: MakeStage, ends_last: bool) -> None:
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
    assert stage.conductor._inner.rungs[20]["a"] == 0.3


def stage_with_a_waiting_report(make_stage: MakeStage) -> Any:
    """Start two trials, of which the worse one reports first."""
    stage = make_stage(ASHA, num_slots=2, is_patient=True, num_trials=2)
    stage.add(a=falling(0), b=falling(2))
    for trial in stage.trials:
        trial.set_status(Trial.RUNNING)
    stage.report(stage.trial("b"))
    return stage


def test_a_waiting_report_is_processed_after_a_resume(make_stage: MakeStage) -> None:
    stage = stage_with_a_waiting_report(make_stage)
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


def test_no_trial_waits_for_a_report_whose_worker_is_lost(make_stage: MakeStage) -> None:
    stage = stage_with_a_waiting_report(make_stage)
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
    (curve,) = stage.conductor._inner.heard.values()
    assert [each.step for each in curve] == [10, 20]


def test_decisions_after_the_saved_state_are_repeated_and_recorded_once(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA)
    stage.add(a=falling(0), b=falling(2))
    state = stage.conductor.state()
    stage.run()
    assert stage.decisions("stopped") == [("b", 10)]
    for trial in stage.trials:  # as Tune restores them from an earlier state
        trial.set_status(Trial.PENDING)
        trial.run_metadata.last_result = {}
    stage.resume(state)
    assert stage.decisions("stopped") == []
    stage.run()
    assert stage.decisions("stopped") == [("b", 10)]


def test_reports_do_not_wait_for_trials_of_a_search_that_is_over(make_stage: MakeStage) -> None:
    stage = make_stage(MEDIAN, num_slots=3, is_patient=True, num_trials=9)
    stage.add(a=falling(0), b=falling(1))
    for trial in stage.trials:
        trial.set_status(Trial.RUNNING)
        stage.report(trial)
    stage.ask()
    assert stage._idle == {"a", "b"}, "there is a slot for a third trial"
    stage.is_search_over = True
    stage.run()
    assert all(trial.is_finished() for trial in stage.trials)
