"""The rules that judge the reports of one moment together, under the conductor."""

import random
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from annealed import EVERY, STEPS, losses
from annealed import plan as planned
from simulated import ASHA, MEDIAN, MakeStage, falling, steered

from orchestrator.record import SweepInfo
from orchestrator.spec import parse_spec
from orchestrator.sweep.schedulers import forecast_rule
from orchestrator.sweep.schedulers.forecast import verdicts
from orchestrator.sweep.schedulers.forecast.plans import MAX_EVALUATIONS, plan_trial, why_median

FORECAST = {"kind": "forecast"}
RATES = {"a": 1e-3, "b": 6e-4, "c": 3e-5, "d": 1.5e-3, "e": 2e-4, "f": 8e-4}


def curves(seed: int = 0) -> dict[str, list[float]]:
    draw = np.random.default_rng(seed)
    return {name: [float(loss) for loss in losses(planned(rate), draw)] for name, rate in RATES.items()}


@pytest.fixture
def pack(make_stage: MakeStage) -> Any:
    """Return a function that makes a stage of trials that report together, every 20 of 400 steps."""

    def make(scheduler: dict[str, Any] = FORECAST, training: dict[str, Any] | None = None, **options: Any) -> Any:
        settings = {"steps": STEPS, "eval_steps": EVERY, "batch_size": 8} | (training or {})
        return make_stage(scheduler, is_patient=True, training=settings, **{"num_slots": 6, "num_trials": 6} | options)

    return make


def play(stage: Any, found: dict[str, list[float]]) -> Any:
    for name in found:
        stage.configs[name] = {"training.learning_rate": RATES[name]}
    stage.to_come = dict(found)
    stage.run()
    return stage


def test_whole_trials_can_be_forecast(pack: Any) -> None:
    assert why_median(pack().conductor._spec, 9) is None


def test_a_slow_trial_stops_early_and_the_best_runs_to_its_end(pack: Any) -> None:
    found = curves()
    stage = play(pack(), found)
    stopped = dict(stage.decisions("stopped"))
    best = min(found, key=lambda name: min(found[name]))
    assert best not in stopped
    assert stopped["c"] <= 6 * EVERY
    assert stopped["c"] >= 2 * EVERY
    why = stage.conductor.why_stopped("c")
    assert why.startswith("forecast: too slow, loss ")
    assert "chance of beating it" in why


def test_a_stopped_trial_counts_for_the_search_by_its_forecast(pack: Any) -> None:
    """Other trials count by their evaluations, which Tune passes."""
    found = curves()
    stage = play(pack(), found)
    stopped = dict(stage.decisions("stopped"))
    assert stage.counted.keys() == stopped.keys()
    for name, step in stopped.items():
        assert stage.counted[name] < min(found[name][: step // EVERY])
    assert stage.counted == stage.conductor._inner.forecasts
    whys = {name: stage.conductor.why_stopped(name) for name in stopped}
    assert any(f"forecast {stage.counted[name]:.3g} " not in whys[name] for name in stopped), "forecast anew later"


def test_a_trial_that_the_rule_and_a_person_stop_at_once_does_not_reach_the_search(pack: Any) -> None:
    found = curves()
    (name, *_), _ = zip(*play(pack(), dict(found)).decisions("stopped"), strict=True)
    stage = steered(pack())
    stage.conductor.steering._leaving[name] = "stop", "somebody"
    stage.conductor.steering.leaves = lambda trial: (  # asked right before the evaluation at which the rule stops it
        "stop" if trial.trial_id == name and name in dict(stage.conductor._inner.forecasts) else None
    )
    play(stage, found)
    assert stage.conductor.why_stopped(name) == "stopped on request of somebody"
    assert name not in stage.counted
    assert ("forget", name) in stage.calls


def test_a_moment_costs_one_forecast_and_a_trial_one_plan(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration takes longer to validate than a curve to forecast."""
    calls: Counter[str] = Counter()

    def counted(call: Any, *args: Any) -> Any:
        calls[call.__name__] += 1
        return call(*args)

    monkeypatch.setattr(forecast_rule, "plan_trial", partial(counted, plan_trial))
    monkeypatch.setattr(verdicts, "forecast", partial(counted, verdicts.forecast))
    rule = forecast_rule.ForecastRule(pack().conductor._spec, 9)
    moments = len(curves()["a"]) - 1
    for i in range(moments):
        rule.judge(
            [
                (
                    SimpleNamespace(trial_id=name, config={"training.learning_rate": RATES[name]}),
                    {"step": EVERY * (i + 1), "tokens": 1, "eval/loss": curve[i]},
                )
                for name, curve in curves().items()
                if name not in rule.ended
            ]
        )
    assert rule.forecasts
    assert calls == {"plan_trial": len(RATES), "forecast": moments}
    assert "_plans" not in rule.__getstate__(), "a plan follows from the configuration"


def test_a_resume_decides_the_same(pack: Any) -> None:
    found = curves()
    whole = play(pack(), found).all_decisions()
    for turns in (7, 31):
        stage = pack()
        for name in found:
            stage.configs[name] = {"training.learning_rate": RATES[name]}
        stage.to_come = dict(found)
        stage.run(turns)
        stage.resume(stage.conductor.state())
        for trial in stage.trials:
            if trial.trial_id in stage._idle:  # its report had not been judged, and comes again
                stage._idle.discard(trial.trial_id)
                before = trial.last_result["step"] - EVERY
                trial.run_metadata.last_result = {"step": before} if before else {}
        stage.run()
        assert stage.all_decisions() == whole


def test_decisions_follow_from_the_curves_alone(pack: Any) -> None:
    """Replay each decision from the recorded curves, without the state of the scheduler."""
    stage = play(pack(), curves())
    info: SweepInfo = stage.conductor._record.info
    for decision in stage.all_decisions():
        replay = type(stage.conductor._inner)(info.spec, info.num_rows)
        for step in range(EVERY, decision.step + 1, EVERY):
            reports = [
                (stage.trial(name), {"step": step, "tokens": 7 * step, "eval/loss": curve[step // EVERY - 1]})
                for name, curve in curves().items()
                if name not in replay.ended
            ]
            stops = replay.judge(reports)
        assert stops[decision.trial_id] == decision.why


def test_the_order_of_reports_does_not_matter(pack: Any) -> None:
    found = []
    for seed in range(3):
        stage = pack()
        stage.draw = random.Random(seed)
        found.append(sorted(map(str, play(stage, curves()).all_decisions())))
    assert found[0] == found[1] == found[2]
    assert found[0]


def test_a_freed_slot_goes_to_the_next_trial_at_once(pack: Any) -> None:
    stage = play(pack(num_slots=3), curves())
    assert stage.decisions("stopped")
    assert not stage.to_come
    order = stage.conductor._reports._order
    assert order._free == sorted(order._free)
    assert {trial.trial_id for trial in stage.trials} == set(RATES)
    first = min(step for _, step in stage.decisions("stopped"))
    assert first < STEPS
    assert all(trial.is_finished() for trial in stage.trials)
    assert max(order._free) < 2 * STEPS, "six whole trials on three slots would end at 800"


@pytest.mark.parametrize(
    ("training", "search", "reason"),
    [
        ({"eval_steps": 150}, {}, "a forecast needs 4 evaluations in a trial, and this one has 3"),
        ({}, {"metric": "eval/token_accuracy"}, "only eval/loss can be forecast"),
    ],
)
def test_what_cannot_be_forecast_falls_to_the_median_rule_and_says_so(
    pack: Any, training: dict[str, Any], search: dict[str, Any], reason: str
) -> None:
    stage = pack(training=training, **search)
    assert why_median(stage.conductor._spec, 9) == reason
    rule = stage.conductor._inner
    levels = {"a": 0.2, "b": 0.3, "c": 0.4, "d": 0.9}
    sign = -1 if search else 1
    metric = search.get("metric", "eval/loss")
    stage.add(**{name: [1.0] * 20 for name in levels})
    stops = []
    for step in (150, 300):
        values = {name: 1 + sign * level for name, level in levels.items()}
        reports = [(stage.trial(n), {"step": step, "tokens": step, metric: value}) for n, value in values.items()]
        stops.append(rule.judge(reports))
    assert stops[0] == {}, "no trial stops at its first evaluation"
    assert [*stops[1]] == ["c", "d"], "b beats the median of 1.2, 1.4 and 1.9"
    assert stops[1]["d"].startswith(f"forecast: by the median rule, because {reason}: {metric} ")
    assert stops[1]["d"].endswith(
        "at step 300 and before is worse than the median of the other trials' means up to there"
    )


def test_a_loss_that_is_no_number_is_a_divergence(pack: Any) -> None:
    stage = pack()
    stage.add(a=[1.0] * 20, b=[1.0] * 20)
    report = {"step": 20, "tokens": 1, "eval/loss": float("inf")}
    stops = stage.conductor._inner.judge([(stage.trial("a"), report), (stage.trial("b"), report | {"eval/loss": 1.0})])
    assert stops == {"a": "forecast: diverged, loss inf at step 20"}


@pytest.mark.parametrize("scheduler", [ASHA, MEDIAN], ids=["asha", "median"])
@pytest.mark.parametrize("names", [["worst", "x", "y", "z"], ["x", "y", "z", "worst"]], ids=["first", "last"])
def test_reports_of_one_moment_are_judged_together(
    scheduler: dict[str, Any], names: list[str], make_stage: MakeStage
) -> None:
    """The worst trial of a pack is stopped at its first report, also where it reports first."""
    levels = {"worst": 9.0, "x": 1.0, "y": 1.1, "z": 1.2}
    stage = make_stage(scheduler, num_slots=4, is_patient=True, num_trials=4)
    stage.add(**{name: falling(levels[name]) for name in names})
    stage.run()
    assert ("worst", 10) in stage.decisions("stopped")


def test_trials_of_other_batch_sizes_are_compared_at_equal_rows(make_stage: MakeStage) -> None:
    """At step 10 a batch of 8 has seen as much as a batch of 4 at step 20, where the others stand at 1.0."""
    space = {"training.batch_size": {"choice": [4, 8]}, "training.learning_rate": {"loguniform": [1e-5, 1e-1]}}
    stage = make_stage(MEDIAN | {"min_trials": 2}, num_slots=3, num_trials=3, space=space)
    rule = stage.conductor._inner
    for name, rows in (("a", 4), ("b", 4), ("big", 8)):
        stage.configs[name] = {"training.batch_size": rows, "training.learning_rate": 1e-3}
        stage.add(**{name: falling(1)})
    by_step = {10: 3.0, 20: 1.0}
    for step, loss in by_step.items():
        rule.judge([(stage.trial(n), {"step": step, "tokens": 1, "eval/loss": loss}) for n in ("a", "b")])
    stops = rule.judge([(stage.trial("big"), {"step": 10, "tokens": 1, "eval/loss": 2.5})])
    assert [*stops] == ["big"], "the others' mean up to 20 steps is 2.0; up to 10 steps it was 3.0"
    assert rule.heard["big"][-1].time == 20


def test_a_plan_has_the_evaluations_of_the_trial_and_not_too_many(document: dict[str, Any]) -> None:
    spec = parse_spec(document | {"training": {"steps": 90, "eval_steps": 20, "accumulation": 2}, "lora": {"rank": 4}})
    found = plan_trial(spec.trial_config({}), 100)
    assert not isinstance(found, str)
    assert [*found.steps] == [20, 40, 60, 80, 90]
    assert (found.peak, found.rank, found.rows) == (2e-4, 4, 8)
    many = parse_spec(document | {"training": {"steps": 1007, "eval_steps": 2}})
    long = plan_trial(many.trial_config({}), 100)
    assert not isinstance(long, str)
    assert len(long.steps) <= MAX_EVALUATIONS
    assert long.steps[-1] == 1007
    assert len({*np.diff(long.steps)[:-1]}) == 1


def test_the_forecast_is_the_default_where_trials_are_searched_by_their_loss(document: dict[str, Any]) -> None:
    space = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    kinds = {
        "forecast": [{"space": space}, {"algorithm": "optuna", "space": space, "num_trials": 2}],
        "none": [{}, {"space": space, "num_trials": 1}, {"space": space, "metric": "eval/token_accuracy"}],
    }
    for kind, searches in kinds.items():
        for search in searches:
            assert parse_spec(document | {"search": search}).scheduler.kind == kind
    written = parse_spec(document | {"search": {"space": space}, "scheduler": {"kind": "none"}})
    assert written.scheduler.kind == "none"
