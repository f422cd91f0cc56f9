"""Trials whose trainable, worker or driver is lost keep their place."""

from typing import Any

import pytest
from ray.tune.experiment import Trial
from simulated import ASHA, BAND, MakeStage, band, falling

from orchestrator.record import BestPoint, TrialResult, TrialState, read_result, write_record
from orchestrator.spec import parse_spec
from orchestrator.sweep.tune_trial import COMPLETE
from orchestrator.sweep.workers.trainable import _report_result

KINDS = [("hyperband", "random"), ("bohb", "bohb")]


def brackets(stage: Any) -> list[list[str]]:
    bands = stage.conductor._inner._hyperbands
    return [[trial.trial_id for trial in each._all_trials] for band in bands for each in band if each]


def run_to(stage: Any, name: str, step: int) -> Any:
    """Run one trial until it has reported a step."""
    trial = stage.trial(name)
    while trial.last_result.get("step", 0) < step:
        trial.set_status(Trial.RUNNING)
        stage.conductor._resume(trial)
        stage.report(trial)
    return trial


@pytest.mark.parametrize("num", [7, 8, 9, 10])
def test_a_restarted_trial_stays_in_its_bracket(num: int, make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=30, num_trials=num)
    stage.add(**dict(list(band().items())[:num]))
    before = brackets(stage)
    trial = run_to(stage, "t0", 30)
    trial.set_status(Trial.RUNNING)
    stage.lose(trial)
    assert trial.status == Trial.PENDING
    assert brackets(stage) == before
    stage.run()
    assert {each.status for each in stage.trials} == {Trial.TERMINATED}
    assert "t0" not in dict(stage.decisions("stopped", "paused")), "its bracket has no rung"


def test_a_restarted_member_of_a_population_is_still_known(make_stage: MakeStage) -> None:
    stage = make_stage({"kind": "pbt", "interval_steps": 10, "quantile": 0.5}, num_slots=4, num_trials=2)
    stage.add(a=falling(0), b=falling(1))
    trial = run_to(stage, "a", 10)
    trial.set_status(Trial.RUNNING)
    stage.lose(trial)
    assert stage.conductor._inner._trial_state[trial].last_score == -0.4


@pytest.mark.parametrize(("kind", "algorithm"), KINDS)
def test_a_trial_that_is_lost_while_it_is_paused_waits(kind: str, algorithm: str, make_stage: MakeStage) -> None:
    stage = make_stage(BAND | {"kind": kind}, num_slots=10, num_trials=10, algorithm=algorithm)
    stage.in_lockstep = True  # a pause takes a while
    stage.add(**band())
    name = "t7" if kind == "hyperband" else "t2"
    trial = run_to(stage, name, 10)
    assert trial.is_saving
    assert trial.status == Trial.RUNNING
    stage.lose(trial)
    assert trial.status == Trial.PAUSED
    assert stage.paths.trial(name).paused.is_file()
    for other in stage.trials:
        other.set_status(Trial.PAUSED if other.status == Trial.RUNNING else other.status)
    stage.run()
    assert {each.status for each in stage.trials} == {Trial.TERMINATED}
    for running in stage.trials:
        assert not stage.paths.trial(running.trial_id).paused.is_file()


def test_a_trial_that_fails_for_good_while_it_is_paused_waits_no_more(make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=10, num_trials=10)
    stage.in_lockstep = True
    stage.add(**band())
    trial = run_to(stage, "t7", 10)
    stage.conductor.on_trial_error(stage, trial)
    trial.set_status(Trial.ERROR)
    assert not stage.paths.trial("t7").paused.is_file()
    assert "t7" not in stage.conductor._waiting.after_report
    stage.run()
    assert {each.status for each in stage.trials} == {Trial.ERROR, Trial.TERMINATED}


def test_a_stop_is_recorded_again_if_the_driver_was_lost_before_it_saved_it(make_stage: MakeStage) -> None:
    stage = make_stage(ASHA)
    stage.add(a=falling(0), b=falling(2))
    state = stage.conductor.state()
    stage.run()
    (first,) = [each for each in stage.all_decisions() if each.trial_id == "b"]
    paths = stage.paths.trial("b")
    ended = {"state": TrialState.STOPPED, "stopped": first.why}
    write_record(paths.result, read_result(paths).model_copy(update=ended))
    for trial in stage.trials:  # as Tune restores them from an earlier state
        trial.set_status(Trial.PENDING)
        trial.run_metadata.last_result = {}
    stage.resume(state)
    assert stage.all_decisions() == []
    trial = stage.trial("b")
    trial.set_status(Trial.RUNNING)
    trial.update_last_result({"step": 10, "tokens": 70, "eval/loss": 2.4, "done": True, COMPLETE: False})
    stage.stop_trial(trial)  # its trainable has found the result
    (again,) = stage.all_decisions()
    assert (again.trial_id, again.step, again.action, again.why) == ("b", 10, "stopped", first.why)
    assert stage.conductor.why_stopped("b") == first.why


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.STOPPED])
def test_a_trainable_that_finds_a_result_reports_whether_it_is_complete(
    state: TrialState, document: dict[str, Any]
) -> None:
    best = BestPoint(step=10, value=0.5, values={"eval/loss": 0.5}, adapter="adapters/step-10")
    result = TrialResult(
        trial_id="a", state=state, config=parse_spec(document).trial_config({}), metric="eval/loss", mode="min",
        step=10, best=best,
    )  # fmt: skip
    assert _report_result(result)[COMPLETE] == (state == TrialState.COMPLETE)
