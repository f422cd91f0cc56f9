"""Requests under the conductor: what is refused, what a stop and a pause do, and a driver that is killed in between."""

from typing import Any

import pytest
from ray.tune.experiment import Trial
from simulated import ASHA, BAND, PBT, MakeStage, falling, steered

from orchestrator.record import BudgetSpent, SweepInfo, TrialState, read_sweep, read_trial, write_record
from orchestrator.record.checked import read_record
from orchestrator.record.held import only_paused
from orchestrator.record.requests import Request, read_answer, unanswered, write_request
from orchestrator.record.standing import have_ended
from orchestrator.sweep.results import ResultKeeper

NONE = {"kind": "none"}


def ask(stage: Any, verb: Any, **fields: Any) -> Request:
    return write_request(stage.paths, verb, **fields)


def take_up(stage: Any) -> None:
    """Take requests up and write the answers, as one iteration of Tune's loop does."""
    steering = stage.conductor.steering
    steering._looked_s = 0.0
    steering.look(stage.conductor)
    steering.take_up(stage.conductor)
    steering.write_answers()


def answer(stage: Any, verb: Any, **fields: Any) -> tuple[bool, str]:
    request = ask(stage, verb, **fields)
    take_up(stage)
    given = read_answer(stage.paths, request)
    assert given is not None
    return given.is_accepted, given.text


@pytest.mark.parametrize("scheduler", [NONE, ASHA])
def test_a_trial_stops_at_its_next_evaluation_and_the_searcher_forgets_it(
    scheduler: dict[str, Any], make_stage: MakeStage
) -> None:
    stage = steered(make_stage(scheduler))
    stage.add(a=falling(0), b=falling(0))
    stage.run(turns=3)
    assert answer(stage, "stop", trial_id="b") == (True, "b stops at its next evaluation")
    stage.run()
    assert [name for name, _ in stage.decisions("stopped")] == ["b"]
    assert stage.conductor.why_stopped("b").startswith("stopped on request of ")
    assert stage.conductor.steering.stopped_by.keys() == {"b"}
    assert ("forget", "b") in stage.calls
    assert stage.trial("a").last_result["step"] == 40


def with_pause_of_b(make_stage: MakeStage, scheduler: dict[str, Any]) -> Any:
    """Return a stage with two trials that have slots, of which somebody has asked to pause `b`."""
    stage = steered(make_stage(scheduler, num_slots=2))
    stage.add(a=falling(0), b=falling(0))
    stage.run(turns=3)
    assert answer(stage, "pause", trial_id="b")[0]
    return stage


@pytest.mark.parametrize("scheduler", [NONE, ASHA])
def test_a_paused_trial_gets_no_slot_until_it_goes_on_also_after_a_resume(
    scheduler: dict[str, Any], make_stage: MakeStage
) -> None:
    stage = with_pause_of_b(make_stage, scheduler)
    stage.run(turns=30)
    assert stage.trial("a").is_finished()
    assert stage.trial("b").status == Trial.PAUSED
    assert stage.paths.trial("b").paused.is_file()
    assert ("set_aside", "b") in stage.calls

    said: list[str] = []
    stage.resume(stage.conductor.state())
    stage.conductor.steering._say = said.append
    stage.run(turns=5)
    assert stage.trial("b").status == Trial.PAUSED
    assert len(said) == 1
    assert "only 1 paused trial left: b; have them go on with: orchestrator go-on" in said[0]
    assert answer(stage, "pause", trial_id="b") == (False, "b: is paused already")
    assert answer(stage, "go-on", trial_id="b") == (True, "b goes on as soon as a slot is free")
    stage.run()
    assert stage.trial("b").last_result["step"] == 40
    assert [name for name, _ in stage.decisions("paused", "resumed")] == ["b", "b"]


def test_an_added_trial_waits_for_a_slot_and_counts_as_one_of_the_sweep(make_stage: MakeStage) -> None:
    stage = steered(make_stage(NONE, num_slots=1, num_trials=1))
    stage.add(a=falling(0))
    stage.run(turns=2)
    request = ask(stage, "add", values={"training.learning_rate": 1e-3})
    take_up(stage)
    added = stage.trial(request.new_trial)
    assert added.status == Trial.PAUSED
    assert ("take_in", request.new_trial) in stage.calls
    stage.run()
    assert added.last_result["step"] == 40
    assert stage.conductor.steering.num_trials == 2
    assert [name for name, _ in stage.decisions("added")] == [request.new_trial]


def test_a_driver_killed_before_its_snapshot_takes_the_request_up_again_and_one_after_it_does_not(
    make_stage: MakeStage,
) -> None:
    stage = steered(make_stage(NONE, num_trials=1))
    stage.add(a=falling(0))
    stage.run(turns=2)
    before = stage.conductor.state()
    request = ask(stage, "add", values={"training.learning_rate": 1e-3})
    steering = stage.conductor.steering
    steering.take_up(stage.conductor)
    after = stage.conductor.state()
    assert unanswered(stage.paths) == [request.name], "the answer is written after the snapshot"

    with_added, stage.trials = stage.trials, [each for each in stage.trials if each.trial_id == "a"]
    stage.resume(before)  # Tune's state is from before the request too
    take_up(stage)
    assert [each.trial_id for each in stage.trials] == ["a", request.new_trial]
    assert stage.conductor.steering.num_trials == 2, "not three"

    (stage.paths.requests / f"{request.name}.answer.json").unlink()
    stage.trials = with_added
    stage.resume(after)
    take_up(stage)
    assert [each.trial_id for each in stage.trials] == ["a", request.new_trial]
    assert unanswered(stage.paths) == []


@pytest.mark.parametrize("scheduler", [BAND, PBT])
def test_trials_that_wait_for_each_other_can_only_be_stopped(scheduler: dict[str, Any], make_stage: MakeStage) -> None:
    stage = steered(make_stage(scheduler))
    stage.add(a=falling(0), b=falling(1))
    stage.run(turns=1)
    is_accepted, text = answer(stage, "pause", trial_id="a")
    assert not is_accepted
    assert "has trials wait for each other" in text
    is_accepted, text = answer(stage, "add", values={"training.learning_rate": 1e-3})
    assert not is_accepted
    assert "compares trials that begin together" in text
    assert answer(stage, "stop", trial_id="a")[0]


@pytest.mark.parametrize(
    ("verb", "fields", "why"),
    [
        ("stop", {"trial_id": "z"}, "the sweep has no such trial"),
        ("stop", {"trial_id": "a"}, "the trial has ended already"),
        ("go-on", {"trial_id": "b"}, "is not paused by a request"),
        ("add", {"values": {"training.learning_rat": 1.0}}, "did you mean learning_rate"),
        ("add", {"values": {"training.learning_rate": "high"}}, "training.learning_rate"),
        ("add", {"values": {"data.max_length": 9}}, "data.max_length cannot vary"),
        ("clone", {"trial_id": "b", "warm": True}, "has no adapter to begin with"),
        (
            "clone",
            {"trial_id": "b", "warm": True, "values": {"lora.target_modules": ["q_proj"]}},
            "lora.target_modules",
        ),
        ("clone", {"trial_id": "z"}, "z: the trial has not begun, or the sweep has no such trial"),
        ("clone", {"trial_id": "c"}, "c: the trial has not begun"),
        ("clone", {"trial_id": "c", "warm": True}, "c: the trial has not begun"),
        ("extend", {"num_trials": 1}, "give the total number"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    verb: str, fields: dict[str, Any], why: str, make_stage: MakeStage
) -> None:
    stage = steered(make_stage(NONE, num_trials=2))
    stage.add(a=[0.5], b=falling(0))
    stage.run(turns=4)
    stage.add(c=falling(0))
    assert stage.trial("a").is_finished()
    is_accepted, text = answer(stage, verb, **fields)
    assert not is_accepted
    assert why in text, text


def test_a_damaged_request_is_refused_and_the_sweep_goes_on(make_stage: MakeStage) -> None:
    stage = steered(make_stage(NONE))
    stage.add(a=falling(0))
    request = ask(stage, "stop", trial_id="a")
    (stage.paths.requests / f"{request.name}.json").write_text("{")
    take_up(stage)
    given = read_answer(stage.paths, request)
    assert given is not None
    assert not given.is_accepted
    assert "is damaged or of another version" in given.text
    stage.run()
    assert stage.trial("a").last_result["step"] == 40


def test_a_sweep_is_extended_once(make_stage: MakeStage) -> None:
    stage = steered(make_stage(NONE, num_trials=2))
    stage.add(a=falling(0))
    is_accepted, text = answer(stage, "extend", num_trials=5, budget=["tokens=1000000"])
    assert is_accepted
    assert "search.num_trials 2 -> 5" in text
    assert "search.budget.tokens None -> 1000000" in text
    assert stage.conductor.steering.num_trials == 5


@pytest.mark.parametrize("scheduler", [NONE, ASHA])
def test_a_stop_while_the_checkpoint_of_a_pause_is_written_is_not_lost(
    scheduler: dict[str, Any], make_stage: MakeStage
) -> None:
    stage = with_pause_of_b(make_stage, scheduler)
    b = stage.trial("b")
    while b.trial_id not in stage.conductor.steering.held:
        stage.report(min((t for t in stage.trials if not t.is_saving), key=lambda t: t.last_result.get("step", 0)))
        stage.ask()
    b.set_status(Trial.RUNNING)  # its checkpoint is still being written
    assert answer(stage, "stop", trial_id="b") == (True, "b stops once the checkpoint of its pause is written")
    assert answer(stage, "go-on", trial_id="b")[0] is False
    assert not b.is_finished()
    b.set_status(Trial.PAUSED)
    stage.conductor.steering.take_up(stage.conductor)
    assert b.is_finished()
    assert stage.conductor.steering.stopped_by.keys() == {"b"}
    assert not stage.paths.trial("b").held.is_file()


def test_a_stop_of_a_trial_that_has_not_begun_is_its_result(make_stage: MakeStage) -> None:
    stage = steered(make_stage(NONE, num_slots=1, num_trials=1))
    stage.add(a=falling(0))
    stage.run(turns=2)
    request = ask(stage, "add", values={"training.learning_rate": 0.5})
    take_up(stage)
    added = stage.trial(request.new_trial)
    keeper = ResultKeeper(read_sweep(stage.paths.root), stage.conductor, lambda: None)
    stage.stopped = lambda trial: keeper.on_trial_complete(1, stage.trials, trial)
    assert answer(stage, "stop", trial_id=added.trial_id) == (True, f"{added.trial_id} is stopped")
    stage.run()
    keeper.on_trial_complete(1, stage.trials, stage.trial("a"))
    record = read_sweep(stage.paths.root)
    result = read_trial(record.paths.trial(added.trial_id), record.info)
    assert (result.state, result.step, result.added_by) == (TrialState.STOPPED, 0, request.by)
    assert result.stopped == f"stopped on request of {result.stopped_by}"
    assert have_ended(record.info, record.trials(), None)
    stage.resume(stage.conductor.state())
    assert stage.trial(added.trial_id).is_finished(), "a resume does not train it"


def test_an_added_trial_that_is_refused_after_a_kill_is_withdrawn(make_stage: MakeStage) -> None:
    stage = steered(make_stage(NONE, num_trials=1))
    stage.add(a=falling(0))
    stage.run(turns=2)
    before = stage.conductor.state()
    request = ask(stage, "add", values={"training.learning_rate": 1e-3})
    stage.conductor.steering.take_up(stage.conductor)  # and killed before the snapshot
    assert read_sweep(stage.paths.root).info.added == [request.new_trial]

    stage.trials = [each for each in stage.trials if each.trial_id == "a"]
    write_record(stage.paths.budget, BudgetSpent(limit="tokens", allowed=1, spent=2))
    stage.resume(before)
    take_up(stage)
    given = read_answer(stage.paths, request)
    assert given is not None
    assert "the budget is spent" in given.text
    assert read_sweep(stage.paths.root).info.added == []
    assert read_record(SweepInfo, stage.paths.sweep_copy).added == []
    assert stage.conductor.steering.num_trials == 1
    assert not stage.paths.trial(request.new_trial).root.exists()


def test_reports_do_not_wait_for_a_trial_that_was_paused_before_it_began(make_stage: MakeStage) -> None:
    stage = steered(make_stage(ASHA, num_slots=1, is_patient=True, num_trials=1))
    stage.add(a=falling(0))
    stage.run(turns=2)
    first, second = (ask(stage, "add", values={"training.learning_rate": rate}) for rate in (1e-3, 2e-3))
    take_up(stage)
    assert answer(stage, "pause", trial_id=first.new_trial) == (True, f"{first.new_trial} is paused")
    stage.run(turns=20)  # less than a second, and the patience is seconds
    assert stage.trial("a").is_finished()
    assert stage.trial(second.new_trial).is_finished()
    held = stage.trial(first.new_trial)
    assert held.status == Trial.PAUSED
    assert answer(stage, "go-on", trial_id=first.new_trial)[0]
    stage.run(turns=20)
    assert held.is_finished()
    assert stage.decisions("stopped") in ([], [(first.new_trial, 10)])


def test_a_sweep_of_paused_trials_says_so_in_its_folder(make_stage: MakeStage) -> None:
    stage = steered(make_stage(NONE, num_slots=2, num_trials=2))
    stage.add(a=falling(0), b=falling(0))
    stage.run(turns=3)
    added = ask(stage, "add", values={"training.learning_rate": 1e-3}).new_trial
    take_up(stage)

    def left() -> list[str]:
        record = read_sweep(stage.paths.root)
        return only_paused(record, record.trials())

    assert answer(stage, "pause", trial_id="b")[0]
    assert answer(stage, "pause", trial_id=added)[0]
    stage.run(turns=2)
    assert left() == [], "a runs"
    stage.run(turns=30)
    assert left() == ["b", added]
    assert answer(stage, "go-on", trial_id=added)[0]
    assert left() == []
    stage.run(turns=30)
    assert left() == ["b"]
    assert answer(stage, "stop", trial_id="b")[0]
    assert left() == []
