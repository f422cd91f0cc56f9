"""Points that cannot fit into memory: dropped before their trial begins, with the reason, and replaced by others."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from simulated import begin_record

from orchestrator.errors import SweepError
from orchestrator.record import Decision, SweepPaths, read_decisions, read_sweep
from orchestrator.record.decisions import append_decision
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.sweep.results import ResultKeeper
from orchestrator.sweep.schedulers.conductor import Conductor
from orchestrator.sweep.search.factory import make_search_algorithm
from orchestrator.sweep.search.grid_random import tune_space
from orchestrator.sweep.search.unfit import point_check
from orchestrator.sweep.tune_trial import plain_values

RANKS = [4, 8, 16, 32, 64, 128]
ALGORITHMS = ["auto", "random", "optuna"]

Make = Callable[..., Any]


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    return SweepPaths(tmp_path / "sweep")


@pytest.fixture
def make(document: dict[str, Any], paths: SweepPaths) -> Make:
    """`make("random", largest=16, ...)`: a search in which ranks above 16 do not fit, four trials at a time."""

    def build(algorithm: str, largest: int, space: Any = None, **search: Any) -> Any:
        kind = "grid" if algorithm == "grid" else "choice"
        section = {"algorithm": algorithm, "skip_unfit": True, "space": space or {"lora.rank": {kind: RANKS}}, **search}
        spec = parse_spec(document | {"search": section, "scheduler": {"kind": "none"}})
        begin_record(paths, spec)
        return started(paths, spec, largest)

    return build


def started(paths: SweepPaths, spec: SweepSpec, largest: int) -> Any:
    check = point_check(spec, lambda config: "needs 99 GiB" if config.lora.rank > largest else None)
    search = make_search_algorithm(read_sweep(paths.root), 4, check)
    tune.register_trainable("idle", lambda _: None)
    run = {"run": "idle", "config": tune_space(spec.search), "num_samples": spec.search.total_trials}
    search.add_configurations({"sweep": run})
    return search


def ranks(search: Any, number: int = 100) -> list[int]:
    """Return the ranks of trials that are drawn and end one after another, at most so many."""
    found: list[int] = []
    while len(found) < number and (trial := search.next_trial()) is not None:
        found.append(plain_values(trial.config)["lora.rank"])
        search.on_trial_complete(trial.trial_id, {"eval/loss": 1.0 / found[-1], "training_iteration": 1})
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_point_is_drawn_for_one_that_cannot_fit(algorithm: str, make: Make) -> None:
    space = {"lora.rank": {"choice": RANKS}, "training.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    search = make(algorithm, 16, space, num_trials=8)
    drawn = ranks(search)
    dropped = search.take_dropped()
    assert len(drawn) == 8, "as many trials as were asked for"
    assert max(drawn) <= 16
    assert dropped
    assert all("lora.rank" in each.why and each.why.endswith(": needs 99 GiB") for each in dropped)
    assert search.take_dropped() == [], "each is returned once"


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "grid"])
def test_a_space_with_few_points_gives_as_many_trials_as_fit(algorithm: str, make: Make) -> None:
    search = make(algorithm, 16, **({} if algorithm == "grid" else {"num_trials": 6}))
    assert sorted(ranks(search)) == [4, 8, 16]
    assert len(search.take_dropped()) == 3
    assert search.is_finished()


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "grid"])
def test_a_search_in_which_nothing_fits_is_refused(algorithm: str, make: Make) -> None:
    search = make(algorithm, 1, **({} if algorithm == "grid" else {"num_trials": 6}))
    with pytest.raises(SweepError, match=r"search.skip_unfit: 6 points cannot fit .* needs 99 GiB"):
        search.next_trial()


def test_a_range_in_which_nothing_fits_is_refused(make: Make) -> None:
    search = make("random", 1, {"training.learning_rate": {"loguniform": [1e-5, 1e-2]}}, num_trials=6)
    with pytest.raises(SweepError, match=r"search.skip_unfit: 100 points cannot fit"):
        search.next_trial()


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "grid"])
def test_a_resume_continues_as_if_it_had_not_been_interrupted(
    algorithm: str, make: Make, paths: SweepPaths, tmp_path: Path
) -> None:
    search = make(algorithm, 16, **({} if algorithm == "grid" else {"num_trials": 6}))
    first = ranks(search, 2)
    search.save_to_dir(str(tmp_path), "one")
    again = started(paths, read_sweep(paths.root).info.spec, 16)
    again.restore_from_dir(str(tmp_path))
    assert sorted(first + ranks(again)) == [4, 8, 16]


def test_a_dropped_point_is_a_decision_and_the_sweep_counts_the_trials_that_are_left(
    make: Make, paths: SweepPaths
) -> None:
    search = make("grid", 16)
    record = read_sweep(paths.root)
    assert record.num_trials() == 6
    conductor = Conductor(record, 4)
    conductor.controller = SimpleNamespace(search_alg=search)
    keeper = ResultKeeper(record, conductor, lambda: None)
    drawn = ranks(search)
    keeper.on_step_end(1, [])
    keeper.on_step_end(2, [])
    decisions = read_decisions(paths)
    assert [each.action for each in decisions] == ["dropped"] * 3
    assert [each.why for each in decisions] == [f"lora.rank {rank}: needs 99 GiB" for rank in (32, 64, 128)]
    assert record.num_trials() == len(drawn) == 3
    assert paths.trial_ids() == []


def test_without_the_setting_the_number_of_trials_is_that_of_the_experiment(
    document: dict[str, Any], paths: SweepPaths
) -> None:
    section = {"algorithm": "grid", "space": {"lora.rank": {"grid": RANKS}}}
    begin_record(paths, parse_spec(document | {"search": section}))
    append_decision(paths, Decision(trial_id="t", step=0, action="dropped", why="too large"))
    assert read_sweep(paths.root).num_trials() == 6
