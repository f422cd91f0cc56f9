"""The search algorithms: they are seeded, stay within the space, and learn from what trials report."""

import logging
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune
from simulated import begin_record

from orchestrator.record import BudgetSpent, SweepPaths, read_sweep, write_record
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.sweep.search.factory import make_search_algorithm, make_searcher
from orchestrator.sweep.search.grid_random import tune_space

Document = dict[str, Any]
Point = dict[str, Any]

SPACE = {
    "training.optimizer": {"choice": ["adamw_torch", "sgd"]},
    "training.weight_decay": {"qloguniform": [0.01, 0.1, 0.01], "when": {"training.optimizer": "adamw_torch"}},
    "training.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "lora.rank": {"lograndint": [2, 65]},
    "lora.dropout": {"quniform": [0.0, 0.3, 0.1]},
    "lora.target_modules": {"choice": [["q_proj"], "all-linear"]},
}
FIRST = [
    {
        "training.optimizer": "sgd", "training.learning_rate": 1e-3, "lora.rank": 8, "lora.dropout": 0.1,
        "lora.target_modules": ["q_proj"],
    },
    {
        "training.optimizer": "adamw_torch", "training.weight_decay": 0.03, "training.learning_rate": 2e-3,
        "lora.rank": 16, "lora.dropout": 0.3, "lora.target_modules": "all-linear",
    },
]  # fmt: skip
BOHB = pytest.param(
    "bohb",
    marks=pytest.mark.skipif(find_spec("hpbandster") is None, reason="the extra bohb, which needs a C compiler"),
)
LEARNING = ["optuna", "hyperopt", BOHB]
ALGORITHMS = ["random", *LEARNING]
RATE = {"training.learning_rate": {"loguniform": [1e-6, 1e-1]}}


@pytest.fixture
def make(document: Document) -> Callable[..., SweepSpec]:
    """Return a function that makes an experiment with a search algorithm."""

    def build(algorithm: str, space: Any = SPACE, **search: Any) -> SweepSpec:
        kind = "bohb" if algorithm == "bohb" else "none"
        document["training"] = {"steps": 9, "eval_steps": 3}
        written = {"algorithm": algorithm, "space": space, "num_trials": 40, **search}
        return parse_spec(document | {"search": written, "scheduler": {"kind": kind}})

    return build


def searched(spec: SweepSpec, number: int, loss: Callable[[Point], float] = lambda _: 1.0) -> list[Point]:
    """Return the first points of a search. Each reports its loss before the next one is drawn."""
    searcher = make_searcher(spec, max_concurrent=2)
    if spec.search.algorithm in ("random", "grid"):
        tune.register_trainable("idle", lambda _: None)
        run = {"run": "idle", "config": tune_space(spec.search), "num_samples": spec.search.total_trials}
        searcher.add_configurations({"sweep": run})
    points = []
    for i in range(number):
        if spec.search.algorithm in ("random", "grid"):
            trial = searcher.next_trial()
            name, point = trial.trial_id, trial.config
        else:
            name = f"trial-{i}"
            point = searcher.suggest(name)
        points.append(point)
        report = {spec.search.metric: loss(point), "training_iteration": 1, "hyperband_info": {"budget": 1}}
        searcher.on_trial_result(name, report)
        searcher.on_trial_complete(name, report)
    return points


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_seed_reproduces_the_points_and_another_seed_gives_others(
    algorithm: str, make: Callable[..., SweepSpec]
) -> None:
    np.random.seed(1)
    first = searched(make(algorithm, seed=7), 25, lambda point: point["lora.rank"])
    np.random.seed(2)
    random.seed(3)
    assert searched(make(algorithm, seed=7), 25, lambda point: point["lora.rank"]) == first
    other = searched(make(algorithm, seed=8), 25, lambda point: point["lora.rank"])
    assert not [point for point in other if point in first]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_points_are_in_the_space_and_the_first_ones_are_those_given(
    algorithm: str, make: Callable[..., SweepSpec]
) -> None:
    spec = make(algorithm, first=FIRST)
    points = searched(spec, 30, lambda point: point["lora.rank"])
    assert points[:2] == FIRST
    for point in points:
        assert all(spec.search.space[path].holds(value) for path, value in point.items()), point
        there = point["training.optimizer"] == "adamw_torch"
        assert set(point) == {path for path in SPACE if there or path != "training.weight_decay"}
        assert spec.trial_config(point).varied == point
    assert {point["training.optimizer"] for point in points[2:]} == {"adamw_torch", "sgd"}
    assert len({str(point["lora.target_modules"]) for point in points[2:]}) == 2


@pytest.mark.parametrize(
    ("algorithm", "sampler"),
    [("optuna", "tpe"), ("optuna", "cmaes"), ("hyperopt", None), pytest.param("bohb", None, marks=BOHB.marks)],
)
def test_reports_guide_the_search(
    algorithm: str, sampler: str | None, make: Callable[..., SweepSpec], caplog: pytest.LogCaptureFixture
) -> None:
    """It finds low rates where they are good, and high rates where those are; before that, it draws the same points."""
    caplog.set_level(logging.WARNING, "hpbandster")
    space = RATE | {"lora.dropout": {"uniform": [0.0, 0.5]}}
    spec = make(algorithm, space, seed=5, startup_trials=4, **({"sampler": sampler} if sampler else {}))

    def rates(sign: int) -> list[float]:
        def loss(point: Point) -> float:
            return float(sign * np.log10(point["training.learning_rate"]))

        return [float(np.log10(point["training.learning_rate"])) for point in searched(spec, 40, loss)]

    low, high = rates(1), rates(-1)
    same = next(i for i in range(40) if low[i] != high[i])
    assert 1 <= same <= 12, "points drawn at random, or reports had no effect"
    assert np.mean(low[-15:]) < np.mean(low[:same]) < np.mean(high[-15:])
    assert np.mean(high[-15:]) - np.mean(low[-15:]) > 1
    assert "failed" not in caplog.text, "hpbandster draws at random if its model fails"


@pytest.mark.parametrize("algorithm", LEARNING)
def test_a_metric_to_maximize_is_searched_at_its_other_end(algorithm: str, make: Callable[..., SweepSpec]) -> None:
    settings = {"startup_trials": 4, "seed": 1}

    def rate(point: Point) -> float:
        return float(np.log10(point["training.learning_rate"]))

    most = searched(make(algorithm, RATE, metric="eval/token_accuracy", **settings), 25, rate)
    least = searched(make(algorithm, RATE, **settings), 25, rate)
    assert searched(make(algorithm, RATE, **settings), 25, lambda point: -rate(point)) == most != least


@pytest.mark.parametrize("algorithm", LEARNING)
def test_a_restored_search_continues_as_without_the_interruption(
    algorithm: str, make: Callable[..., SweepSpec], tmp_path: Path
) -> None:
    spec = make(algorithm, seed=3, first=FIRST, **({} if algorithm == "bohb" else {"startup_trials": 5}))
    whole = searched(spec, 20, lambda point: point["lora.rank"])
    before = make_searcher(spec, max_concurrent=9)

    def go(searcher: Any, first: int, last: int) -> list[Point]:
        points = []
        for i in range(first, last):
            points.append(searcher.suggest(f"trial-{i}"))
            report = {"eval/loss": points[-1]["lora.rank"], "training_iteration": 1, "hyperband_info": {"budget": 1}}
            searcher.on_trial_result(f"trial-{i}", report)
            searcher.on_trial_complete(f"trial-{i}", report)
        return points

    assert go(before, 0, 12) == whole[:12]
    before.save(str(tmp_path / "state"))
    after = make_searcher(spec, max_concurrent=3)
    after.restore(str(tmp_path / "state"))
    assert go(after, 12, 20) == whole[12:]
    assert getattr(after, "max_concurrent", None) or after._max_concurrent == 3


def test_a_grid_has_each_combination_once(make: Callable[..., SweepSpec]) -> None:
    space = {
        "training.optimizer": {"grid": ["adamw_torch", "sgd"]},
        "training.weight_decay": {"grid": [0.0, 0.1], "when": {"training.optimizer": "adamw_torch"}},
        "lora.target_modules": {"grid": [["q_proj"], "all-linear"]},
    }
    spec = make("grid", space, num_trials=None)
    assert searched(spec, spec.search.total_trials) == [*spec.search.points()]
    assert spec.search.total_trials == 6


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_resumed_search_uses_the_current_number_of_slots(algorithm: str) -> None:
    spec = load_spec("experiments/demo.yaml", [f"search.algorithm={algorithm}"])
    before, today = make_searcher(spec, 3), make_searcher(spec, 5)
    before.live_trials = {"a"}
    today.set_state(before.get_state())
    assert today.max_concurrent == 5
    assert today.live_trials == {"a"}


@pytest.mark.parametrize("kind", ["hyperband", "pbt"])
def test_trials_that_take_turns_are_all_made_at_the_start(kind: str) -> None:
    space = "search.space={training.learning_rate: {loguniform: [1e-4, 1e-2]}}"
    spec = load_spec("experiments/demo.yaml", [space, "search.tied={}", f"scheduler.kind={kind}"])
    searcher = make_searcher(spec, 3)
    assert searcher.max_concurrent == 0
    searcher._live_trials = {"a"}
    searcher.set_finished()
    assert not searcher.is_finished(), "Tune would keep no trainable for trials that wait"
    assert searcher.next_trial() is None
    searcher.on_trial_complete("a")
    assert searcher.is_finished()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_point_is_drawn_twice(algorithm: str, make: Callable[..., SweepSpec]) -> None:
    """Low ranks are better, so that a model returns to the same points. In the end all 27 are drawn."""
    space = {
        "lora.rank": {"choice": [4, 8, 16]},
        "lora.dropout": {"quniform": [0.0, 0.2, 0.1]},
        "training.optimizer": {"choice": ["adamw_torch", "sgd"]},
        "training.weight_decay": {"choice": [0.0, 0.1], "when": {"training.optimizer": "adamw_torch"}},
    }
    startup = {} if algorithm == "random" else {"startup_trials": 5}
    first = [{"lora.rank": 8, "lora.dropout": 0.1, "training.optimizer": "sgd"}]
    spec = make(algorithm, space, num_trials=27, first=first, **startup)
    assert spec.search.num_points == 27
    points = searched(spec, 27, lambda point: point["lora.rank"])
    assert points[0] == first[0]
    assert sorted(repr(sorted(each.items())) for each in points) == sorted(
        repr(sorted(each.items())) for each in spec.search.points()
    )


@pytest.mark.parametrize("algorithm", LEARNING)
def test_points_from_before_a_resume_are_not_drawn_again(
    algorithm: str, make: Callable[..., SweepSpec], tmp_path: Path
) -> None:
    spec = make(algorithm, {"lora.rank": {"choice": [1, 2, 3, 4, 5, 6]}}, num_trials=6, startup_trials=2)
    before, after = make_searcher(spec, max_concurrent=9), make_searcher(spec, max_concurrent=9)
    first = [before.suggest(f"a{i}")["lora.rank"] for i in range(3)]
    before.save(str(tmp_path / "state"))
    after.restore(str(tmp_path / "state"))
    rest = [after.suggest(f"b{i}")["lora.rank"] for i in range(3)]
    assert sorted(first + rest) == [1, 2, 3, 4, 5, 6]


def test_a_population_repeats_points_once_all_are_drawn(document: Document) -> None:
    search = {"space": {"training.learning_rate": {"choice": [1e-4, 1e-3, 1e-2]}}, "num_trials": 5}
    training = {"steps": 9, "eval_steps": 3}
    spec = parse_spec(document | {"search": search, "training": training, "scheduler": {"kind": "pbt"}})
    rates = [point["training.learning_rate"] for point in searched(spec, 5)]
    assert set(rates[:3]) == {1e-4, 1e-3, 1e-2}
    assert set(rates[3:]) <= set(rates[:3])


@pytest.mark.parametrize("algorithm", ["random", "optuna", "hyperopt"])
@pytest.mark.parametrize("is_over", [False, True])
def test_a_restored_search_draws_the_current_number_of_trials(
    algorithm: str, is_over: bool, make: Callable[..., SweepSpec], tmp_path: Path
) -> None:
    tune.register_trainable("idle", lambda _: None)
    startup = {} if algorithm == "random" else {"startup_trials": 2}

    def drawn(search: Any) -> list[Any]:
        trials: list[Any] = []
        while (trial := search.next_trial()) is not None:
            trials.append(trial.config)
            search.on_trial_complete(trial.trial_id, {"eval/loss": float(len(trials))})
        return trials

    paths = SweepPaths(tmp_path / "sweep")
    spec = make(algorithm, RATE, num_trials=3, **startup)
    begin_record(paths, spec)
    before = make_search_algorithm(read_sweep(paths.root), 2)
    before.add_configurations({"sweep": {"run": "idle", "config": tune_space(spec.search), "num_samples": 3}})
    first = drawn(before)
    before.set_finished()  # as when the budget is spent
    before.save_to_dir(str(tmp_path), "one")
    begin_record(paths, make(algorithm, RATE, num_trials=5, **startup))
    if is_over:
        write_record(paths.budget, BudgetSpent(limit="tokens", allowed=9, spent=9))
    after = make_search_algorithm(read_sweep(paths.root), 2)
    after.restore_from_dir(str(tmp_path))
    rest = drawn(after)
    assert (len(first), len(rest)) == (3, 0 if is_over else 2)
    assert not [point for point in rest if point in first]
