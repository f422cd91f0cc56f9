"""HyperBand and BOHB: skipped rungs, rungs that trials reach together, and the first rung."""

from typing import Any

import pytest
from ray.tune.experiment import Trial
from simulated import MakeStage, falling

from orchestrator.sweep.schedulers.brackets import UNIT, Bohb, HyperBand

KINDS = [("hyperband", "random"), ("bohb", "bohb")]


@pytest.mark.parametrize("in_lockstep", [False, True])
@pytest.mark.parametrize("num_slots", [3, 30])
@pytest.mark.parametrize(("kind", "algorithm"), KINDS)
def test_a_rung_may_be_skipped(
    kind: str, algorithm: str, num_slots: int, in_lockstep: bool, make_stage: MakeStage
) -> None:
    """Trials that are already past the next rung would wait forever in Tune's HyperBand."""
    scheduler = {"kind": kind, "grace_tokens": 20, "max_tokens": 280, "reduction_factor": 2}
    stage = make_stage(scheduler, num_slots=num_slots, num_trials=20, algorithm=algorithm)
    stage.in_lockstep = in_lockstep
    stage.add(**{f"t{i:02}": falling(i) for i in range(20)})  # an evaluation every 70 tokens; rungs at 20, 40, 80, ...
    stage.run()
    assert {trial.status for trial in stage.trials} == {Trial.TERMINATED}
    stopped = dict(stage.decisions("stopped"))
    for bracket in [each for band in stage.conductor._inner._hyperbands for each in band if each]:
        names = [trial.trial_id for trial in bracket._all_trials]
        if bracket._r0 <= 3 and len(names) == bracket._n0:  # in units of 20 tokens
            assert names[0] not in stopped, "the best of a bracket runs to its end"
            assert stopped[names[-1]] == 10, "the worst ends at the first evaluation"


def test_a_trial_stopped_at_a_rung_stays_stopped_when_the_next_rung_is_passed_too(make_stage: MakeStage) -> None:
    scheduler = {"kind": "hyperband", "grace_tokens": 20, "max_tokens": 160, "reduction_factor": 2}
    stage = make_stage(scheduler, num_slots=1, num_trials=20)
    stage.add(**{f"t{i:02}": falling(i) for i in range(20)})
    stage.run()
    at_rung = [each for each in stage.all_decisions() if each.action != "resumed"]
    last = {each.trial_id: each.action for each in at_rung}
    assert all(last[name] == "stopped" for name, _ in stage.decisions("stopped"))


def test_bohb_halves_a_bracket_once_all_its_trials_have_reported(make_stage: MakeStage) -> None:
    """Two trials report together: the first is being saved while the second reports, and counts as waiting."""
    stage = make_stage(
        {"kind": "bohb", "grace_steps": 10, "reduction_factor": 2}, num_slots=2, num_trials=20, algorithm="bohb"
    )
    stage.in_lockstep = True
    stage.to_come = {f"t{i:02}": falling(i) for i in range(14)}
    waiting: set[str] = set()
    stage.search_alg.searcher.on_pause = waiting.add
    unpause = stage.search_alg.searcher.on_unpause
    stage.search_alg.searcher.on_unpause = lambda name: (waiting.discard(name), unpause(name))
    stage.run()
    actions = [each.action for each in stage.all_decisions()]
    assert actions[:4] == ["paused", "paused", "paused", "stopped"], "the first bracket has four"
    assert {trial.status for trial in stage.trials} == {Trial.TERMINATED}
    assert waiting <= {name for name, _ in stage.decisions("paused")}, "the searcher knows which trials do not wait"


@pytest.mark.parametrize("scheduler", [HyperBand, Bohb])
@pytest.mark.parametrize(("factor", "longest"), [(7, 49), (9, 729), (3, 729), (6, 46656), (2, 5), (3, 27)])
def test_first_rungs_are_whole(scheduler: Any, factor: int, longest: int) -> None:
    """Tune's arithmetic would lose the rung at the grace period: 49 * 7**-2 is less than 1."""
    made = scheduler(time_attr=UNIT, max_t=longest, reduction_factor=factor)
    expected = [longest // factor**halvings for halvings in range(made._s_max_1)]
    assert [made._get_r0(halvings) for halvings in range(made._s_max_1)] == expected
