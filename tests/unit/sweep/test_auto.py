"""The default search: it begins at the prior, follows the results, explains itself, and survives a resume."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from ray import tune
from simulated import begin_record

from orchestrator.rate_prior import with_prior
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.axes import Axis
from orchestrator.spec.search import RATE
from orchestrator.sweep.search import models
from orchestrator.sweep.search.coordinates import Coordinate
from orchestrator.sweep.search.factory import make_search_algorithm, make_searcher
from orchestrator.sweep.search.grid_random import tune_space
from orchestrator.sweep.search.models import expected_gain, propose

Document = dict[str, Any]
Point = dict[str, Any]
Make = Callable[..., SweepSpec]

SPACE = {
    RATE: {"loguniform": [1e-5, 1e-1]},
    "lora.rank": {"choice": [64, 8, 16]},
    "lora.dropout": {"choice": [0.0, 0.05, 0.1]},
}
BEST_RATE = 2e-3


@pytest.fixture
def make(document: Document) -> Make:
    """Return a function that makes an experiment of algorithm auto, with its prior."""

    def build(space: Any = SPACE, **search: Any) -> SweepSpec:
        written = {"space": space, "num_trials": 30, "prior": {RATE: 1e-3}} | search
        return with_prior(parse_spec(document | {"search": written}))[0]

    return build


def loss_of(point: Point) -> float:
    """Return a loss whose minimum is at BEST_RATE and rank 16; it hardly depends on the dropout."""
    away = math.log10(point[RATE] / BEST_RATE)
    return 1 + away**2 + 0.2 * abs(math.log2(point["lora.rank"] / 16)) + 0.01 * point["lora.dropout"]


def searched(searcher: Any, first: int, last: int, loss: Callable[[Point], float] = loss_of) -> list[Point]:
    """Return points of a search in which each trial reports before the next one is drawn."""
    points = []
    for i in range(first, last):
        points.append(searcher.suggest(f"t{i}"))
        searcher.on_trial_complete(f"t{i}", {searcher.metric: loss(points[-1]), "training_iteration": 1})
    return points


def test_it_begins_at_the_prior_and_at_other_rates_with_the_largest_rank(make: Make) -> None:
    points = searched(make_searcher(make(), 4), 0, 3)
    assert points[0] == {RATE: 1e-3, "lora.rank": 64, "lora.dropout": 0.05}
    assert [each[RATE] for each in points] == pytest.approx([1e-3, 3e-3, 1e-3 / 3])
    assert [{**each, RATE: 0} for each in points] == [{**points[0], RATE: 0}] * 3


def test_points_of_the_user_come_first(make: Make) -> None:
    given = {RATE: 5e-5, "lora.rank": 8, "lora.dropout": 0.1}
    points = searched(make_searcher(make(first=[given]), 4), 0, 2)
    assert points[0] == given
    assert points[1][RATE] == 1e-3


def test_results_lead_it_to_the_best_values(make: Make) -> None:
    points = searched(make_searcher(make(), 4), 0, 16)
    best = min(points, key=loss_of)
    assert best["lora.rank"] == 16
    assert best[RATE] == pytest.approx(BEST_RATE, rel=0.25)


def test_a_metric_to_maximize_is_searched_at_its_other_end(make: Make) -> None:
    spec = make(metric="eval/token_accuracy")
    points = searched(make_searcher(spec, 4), 0, 12, lambda point: -loss_of(point))
    assert points == searched(make_searcher(make(), 4), 0, 12)


def test_a_wrong_prior_is_left(make: Make) -> None:
    points = searched(make_searcher(make(prior={RATE: 3e-5}), 4), 0, 20)
    assert min(map(loss_of, points)) < 1.05


def test_trials_that_run_are_not_repeated_and_none_waits_for_results(make: Make) -> None:
    searcher = make_searcher(make(), 30)
    points = [searcher.suggest(f"t{i}") for i in range(12)]
    assert len({repr(point) for point in points}) == 12
    assert len({point["lora.rank"] for point in points}) > 1


def test_failures_and_repeated_reports_count_as_they_should(make: Make) -> None:
    searcher = make_searcher(make(), 4)
    for i, rate_fails in enumerate([False, True, False]):
        searcher.suggest(f"t{i}")
        searcher.on_trial_result(f"t{i}", {"eval/loss": 2.0 - i, "training_iteration": 1})
        if rate_fails:
            searcher.report_failure(f"t{i}")
        else:
            searcher.on_trial_complete(f"t{i}", {"eval/loss": 5.0, "training_iteration": 2})
    assert [trial.best for trial in searcher.searcher._trials.values()] == [2.0, math.inf, 0.0]


def test_a_stopped_trial_counts_by_its_forecast(make: Make) -> None:
    """Tune passes its last report after that, which changes nothing."""
    searcher = make_searcher(make(), 4)
    for name in ("whole", "stopped"):
        searcher.suggest(name)
        searcher.on_trial_result(name, {"eval/loss": 2.0, "training_iteration": 1})
    searcher.count_as("stopped", 1.25)
    for name in ("whole", "stopped"):
        searcher.on_trial_complete(name, {"eval/loss": 1.5, "training_iteration": 2})
    assert [trial.best for trial in searcher.searcher._trials.values()] == [1.5, 1.25]
    searcher.count_as("stopped", 1.375)
    assert [trial.best for trial in searcher.searcher._trials.values()] == [1.5, 1.375], "forecast anew"


def test_a_forecast_is_given_to_searchers_that_cannot_take_it(make: Make) -> None:
    spec = make(algorithm="optuna", prior={})
    searcher = make_searcher(spec, 4)
    searcher.suggest("stopped")
    searcher.count_as("stopped", 1.25)
    searcher.on_trial_complete("stopped", {"eval/loss": 1.5, "training_iteration": 2})


def test_each_trial_has_a_reason(make: Make) -> None:
    searcher = make_searcher(make(), 4)
    searched(searcher, 0, 5)
    reasons = [searcher.searcher.why_chosen(f"t{i}") for i in range(5)]
    assert reasons[0].startswith("begins at the prior (training.learning_rate 0.001, lora.rank 64")
    assert reasons[1].startswith("3 times the rate of the prior")
    assert reasons[3].startswith("Gaussian process on 3 results expects eval/loss ")
    assert "the best is eval/loss" in reasons[4]
    assert searcher.searcher.why_chosen("of another sweep") is None


@pytest.mark.parametrize("when", [None, {"lora.rank": 64}])
def test_a_restored_search_continues_as_without_the_interruption(
    make: Make, tmp_path: Path, when: Point | None
) -> None:
    space = SPACE | ({"lora.alpha": {"choice": [16, 32], "when": when}} if when else {})
    spec = make(space)
    whole = searched(make_searcher(spec, 9), 0, 12)
    before, after = make_searcher(spec, 9), make_searcher(spec, 3)
    assert searched(before, 0, 7) == whole[:7]
    before.save(str(tmp_path / "state"))
    after.restore(str(tmp_path / "state"))
    assert searched(after, 7, 12) == whole[7:]
    assert after.max_concurrent == 3
    assert after.searcher.why_chosen("t0") is not None


def test_fields_that_exist_only_with_others_are_searched_there(make: Make) -> None:
    space = SPACE | {"lora.alpha": {"choice": [16, 32], "when": {"lora.rank": [8, 16]}}}
    points = searched(make_searcher(make(space), 4), 0, 12)
    assert all(("lora.alpha" in point) == (point["lora.rank"] != 64) for point in points)
    assert {point["lora.rank"] for point in points} > {64}


def test_a_small_space_is_tried_whole(make: Make) -> None:
    space = {"lora.rank": {"choice": [8, 16]}, "lora.dropout": {"choice": [0.0, 0.1]}}
    spec = make(space, num_trials=4, prior={})
    points = searched(make_searcher(spec, 4), 0, 4, lambda point: float(point["lora.rank"]))
    assert {repr(point) for point in points} == {repr(point) for point in spec.search.points()}


@pytest.mark.parametrize(
    ("axis", "ends", "category"),
    [
        ({"choice": [64, 8, 16]}, [8, 64], False),
        ({"loguniform": [1e-5, 1e-3]}, [1e-5, 1e-3], False),
        ({"qrandint": [4, 12, 4]}, [4, 12], False),
        ({"choice": ["cosine", "linear"]}, ["cosine", "linear"], True),
        ({"choice": [True, False]}, [True, False], True),
    ],
)
def test_a_coordinate_gives_back_each_value(axis: Point, ends: list[Any], category: bool) -> None:
    coordinate = Coordinate.of(Axis.model_validate(axis))
    assert coordinate.is_category == category
    drawn = [coordinate.encode(value) for value in ends]
    assert [coordinate.decode(each) for each in drawn] == pytest.approx(ends)
    assert coordinate.decode(drawn[0]) == ends[0]


def test_the_expected_gain_is_that_of_a_normal_distribution() -> None:
    assert expected_gain(1.0, 1.0, 0.5) == pytest.approx(0.5 / math.sqrt(2 * math.pi))
    assert expected_gain(1.0, 0.4, 0.0) == pytest.approx(0.6)
    assert expected_gain(1.0, 1.4, 0.0) == 0.0


def test_a_strong_prior_decides_where_results_say_little() -> None:
    """Without the prior, the model goes to where it knows nothing."""
    space = {"x": Coordinate.of(Axis.model_validate({"uniform": [0.0, 1.0]})).distribution()}
    finished = [({"x": 0.5}, 1.0), ({"x": 0.55}, 1.01), ({"x": 0.45}, 1.01)]

    def proposed(weight: float) -> float:
        found = propose(space, finished, [], {"x": 0.5}, weight, has_conditions=False, seed=0)
        return abs(float(found.drawn["x"]) - 0.5)

    assert proposed(1000.0) < 0.1 < proposed(0.0)


def test_without_scipy_tpe_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    space = {"x": Coordinate.of(Axis.model_validate({"uniform": [0.0, 1.0]})).distribution()}
    found = propose(space, [({"x": 0.5}, 1.0)], [{"x": 0.4}], {"x": 0.5}, 1.0, has_conditions=False, seed=0)
    assert (found.sampler, found.forecast) == ("TPE", None)


GSM8K = [
    (0.5, 0.6032, 4.1773), (0.5, 0.7958, 4.7121), (0.5, 0.4106, 4.7682), (0.2032, 0.0703, 6.4676),
    (0.4659, 0.3701, 5.0872), (0.6356, 0.5959, 4.1831), (0.4086, 0.5853, 4.2123), (0.5069, 0.6281, 4.148),
    (0.6946, 0.6174, 4.1616), (0.6545, 0.6422, 4.1156), (0.4618, 0.6505, 4.1637),
]  # fmt: skip
"""Dropout and learning rate, as shares of their axes, and losses of a sweep on the embedded base."""


def test_the_prior_does_not_decide_where_a_running_trial_promises_more_than_any_other() -> None:
    """Optuna's improvement of a new point and running ones together hardly depends on the new point then. A sweep of
    24 trials ran the point of the prior, which it knew, five times."""
    space: dict[str, Any] = {"dropout": FloatDistribution(0.0, 1.0), "rate": FloatDistribution(0.0, 1.0)}
    prior = {"dropout": 0.5, "rate": 0.6032}
    finished = [({"dropout": dropout, "rate": rate}, loss) for dropout, rate, loss in GSM8K]
    proposal = propose(space, finished, [{"dropout": 0.7174, "rate": 0.6714}], prior, 10 / len(finished), False, seed=0)
    assert max(abs(proposal.drawn[name] - prior[name]) for name in prior) > 0.02
    assert proposal.forecast is not None
    assert proposal.forecast.gain > 1e-4


def test_a_forecast_is_not_named_as_the_best_result(make: Make) -> None:
    """A stopped trial counts by its forecast, which no trial has shown."""
    searcher = make_searcher(make(), 1)
    searched(searcher, 0, 4)
    searcher.count_as("t1", 0.25)
    searcher.suggest("t4")
    why = searcher.searcher.why_chosen("t4")
    assert "the best is eval/loss" in why
    assert "the best is eval/loss 0.25" not in why


@pytest.mark.parametrize("algorithm", ["auto", "optuna", "random"])
def test_a_trial_outside_the_space_can_be_stopped_and_can_end(algorithm: str, make: Make, tmp_path: Path) -> None:
    """The searcher does not know it, also after a resume."""
    spec = make(algorithm=algorithm, prior={RATE: 1e-3} if algorithm == "auto" else {})
    begin_record(SweepPaths(tmp_path / "s"), spec)
    record = read_sweep(tmp_path / "s")
    tune.register_trainable("idle", lambda _: None)
    search = make_search_algorithm(record, 2)
    search.add_configurations({"sweep": {"run": "idle", "config": tune_space(spec.search), "num_samples": 30}})
    search.next_trial()
    search.take_in("stopped", None)
    search.take_in("ended", None)
    assert search.next_trial() is None, "both count for the limit"
    search.save_to_dir(str(tmp_path), "one")
    search = make_search_algorithm(record, 2)
    search.restore_from_dir(str(tmp_path))
    search.forget("stopped")
    search.on_trial_complete("stopped")
    search.on_trial_result("ended", {"eval/loss": 1.0, "training_iteration": 1})
    search.on_trial_complete("ended", {"eval/loss": 1.0, "training_iteration": 1})
    assert search.next_trial() is not None
