"""HyperBand and BOHB under the conductor: which trials are paused, resumed and stopped, and resumes."""

import math

import pytest
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from simulated import BAND, MakeStage, band, falling

from orchestrator.sweep.schedulers.brackets import HyperBand


@pytest.mark.parametrize("num_slots", [1, 2, 3, 10])
def test_brackets_are_full_with_any_number_of_slots(num_slots: int, make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=num_slots, num_trials=10)
    stage.add(**band())
    assert [trial.status for trial in stage.trials] == ["PAUSED"] * 10, (
        "all trials are known before the first one reports"
    )
    stage.run()
    assert sorted(stage.decisions("stopped")) == [("t3", 20), ("t6", 20), ("t8", 10), ("t9", 10)]
    resumed = set(stage.decisions("resumed"))
    assert resumed <= {("t4", 20), ("t5", 20), ("t6", 10), ("t7", 10), ("t7", 20)}
    assert set(stage.decisions("paused")) >= resumed
    assert not [path for path in stage.paths.root.glob("trials/*/.paused") if path.parent.name not in ("t3", "t8")]
    assert all(trial.status == Trial.TERMINATED for trial in stage.trials)


def test_a_trial_past_the_last_rung_runs_to_its_own_end(make_stage: MakeStage) -> None:
    stage = make_stage(BAND | {"max_steps": 20}, num_trials=4)
    stage.add(a=falling(1), b=falling(2), c=falling(4), d=falling(3))  # two have no rung, two have one at 10 steps
    stage.run()
    assert stage.decisions("stopped") == [("c", 10)]
    assert [stage.trial(name).last_result["step"] for name in "abcd"] == [40, 40, 10, 40]


def test_no_more_trials_run_than_there_are_slots(make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=2, num_trials=10)
    stage.add(**band())
    for _ in range(200):
        stage.run(turns=1)
        assert sum(trial.status == Trial.RUNNING for trial in stage.trials) <= 2


@pytest.mark.parametrize("at_turn", range(1, 40, 6))
def test_brackets_continue_after_a_resume(at_turn: int, make_stage: MakeStage) -> None:
    stage = make_stage(BAND, num_slots=2, num_trials=10)
    stage.add(**band())
    stage.run(at_turn)
    state, before = stage.conductor.state(), stage.all_decisions()
    stage.resume(state)
    assert stage.all_decisions() == before
    stage.run()
    assert sorted(stage.decisions("stopped")) == [("t3", 20), ("t6", 20), ("t8", 10), ("t9", 10)]


@pytest.mark.parametrize("kind", ["hyperband", "bohb"])
def test_a_trial_that_fails_keeps_nobody_waiting(kind: str, make_stage: MakeStage) -> None:
    """Trials that wait for it after the first rung would wait forever in Tune's HyperBand."""
    algorithm = "bohb" if kind == "bohb" else "random"
    stage = make_stage(BAND | {"kind": kind}, num_slots=10, num_trials=10, algorithm=algorithm)
    losses = band()
    losses["t7"][1] = losses["t0"][1] = math.nan
    stage.add(**losses)
    stage.run()
    assert stage.trial("t7").status == Trial.ERROR
    assert {trial.status for trial in stage.trials} == {Trial.ERROR, Trial.TERMINATED}


def test_tunes_hyperband_would_wait_forever(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows why `HyperBand` exists: once Tune is corrected, remove it."""
    monkeypatch.delattr(HyperBand, "_process_bracket")
    stage = make_stage(BAND, num_slots=10, num_trials=10)
    losses = band()
    losses["t7"][1] = math.nan
    stage.add(**losses)
    monkeypatch.setattr("orchestrator.sweep.schedulers.stuck._STUCK_S", 0.0)
    with pytest.raises(TuneError, match="scheduler hyperband lets t6 wait, and no trial trains"):
        stage.run()


def test_bohb_hears_of_every_rung_and_of_the_end(make_stage: MakeStage) -> None:
    stage = make_stage(BAND | {"kind": "bohb"}, num_slots=10, num_trials=4, algorithm="bohb")
    stage.add(a=falling(0), b=falling(1), c=falling(2), d=falling(3))  # the largest bracket: rungs at 10 and 20 steps
    stage.run()
    assert sorted(stage.decisions("stopped")) == [("b", 20), ("c", 10), ("d", 10)]
    # Tune itself reports the trials that continue, with the data that the scheduler has left in the report.
    assert {(name, budget) for name, _, budget in stage.reported} == {("d", 1), ("b", 2), ("a", 4)}


def test_bohb_puts_new_trials_into_brackets_of_their_own(make_stage: MakeStage) -> None:
    """Tune's BOHB would add them to the last bracket, whose trials have ended, so that they meet no rung."""
    stage = make_stage(BAND | {"kind": "bohb"}, num_slots=1, num_trials=20, algorithm="bohb")
    stage.to_come = {f"t{i:02}": falling(i) for i in range(14)}
    stage.run()
    brackets = [bracket for each in stage.conductor._inner._hyperbands for bracket in each]
    assert [len(bracket._all_trials) for bracket in brackets][:4] == [4, 3, 3, 4]
    assert [name for name, _ in stage.decisions("stopped")][:2] == ["t02", "t03"]
