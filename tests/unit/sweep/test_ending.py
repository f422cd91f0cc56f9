"""Sweeps that end themselves (`search.stop`), simulated: when they end, when they do not, and what they record."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from simulated import begin_record

from orchestrator.adapters.bundle import SCORES
from orchestrator.rate_prior import with_prior
from orchestrator.record import (
    BestPoint,
    RowScores,
    SweepPaths,
    SweepRecord,
    TrialResult,
    TrialState,
    read_sweep,
    read_trial,
    write_record,
)
from orchestrator.record.extend import extend_sweep, save_extension
from orchestrator.spec import parse_spec
from orchestrator.spec.search import RATE
from orchestrator.sweep.search import ending
from orchestrator.sweep.search.factory import make_search_algorithm
from orchestrator.sweep.search.grid_random import tune_space
from orchestrator.sweep.tune_trial import plain_values

Point = dict[str, Any]
Loss = Callable[[Point], float]
SPACE = {RATE: {"loguniform": [1e-5, 1e-1]}, "lora.rank": {"choice": [8, 16, 64]}}


class Simulated:
    """A sweep of the real search algorithm, whose trials report a given loss one after another."""

    def __init__(self, folder: Path, search: dict[str, Any], document: dict[str, Any]) -> None:
        tune.register_trainable("idle", lambda _: None)
        self.paths = SweepPaths(folder)
        written = {"space": SPACE, "num_trials": 40} | search
        begin_record(self.paths, with_prior(parse_spec(document | {"search": written}))[0])
        self.search = self.begin(1)

    @property
    def record(self) -> SweepRecord:
        return read_sweep(self.paths.root)

    def begin(self, num_slots: int) -> Any:
        search, section = self.driver(num_slots), self.record.info.spec.search
        experiment = {"run": "idle", "config": tune_space(section), "num_samples": section.total_trials}
        search.add_configurations({"sweep": experiment})
        return search

    def driver(self, num_slots: int = 1) -> Any:
        return make_search_algorithm(self.record, num_slots)

    def run(self, loss: Loss, rows: Callable[[float], list[float]] | None = None, number: int = 40) -> int:
        """Run trials until no more come; return how many there were in all."""
        for _ in range(number):
            trial = self.search.next_trial()
            if trial is None:
                break
            value = loss(trial.config)
            self.finish(trial.trial_id, dict(trial.config), value, rows)
            self.search.on_trial_complete(trial.trial_id, {"eval/loss": value})
        return len(self.paths.trial_ids())

    def finish(self, name: str, point: Point, value: float, rows: Callable[[float], list[float]] | None) -> None:
        paths, config = self.paths.trial(name), self.record.info.spec.trial_config(point)
        best = BestPoint(value=value, step=7, values={"eval/loss": value}, adapter="adapters/step-7")
        result = TrialResult(
            trial_id=name, state=TrialState.COMPLETE, config=config, metric="eval/loss", mode="min", best=best,
            tokens=1000,
        )  # fmt: skip
        if math.isinf(value):
            result = result.model_copy(update={"state": TrialState.FAILED, "best": None, "failure": "diverged"})
        write_record(paths.config, config)
        write_record(paths.result, result)
        if rows is not None:
            losses = rows(value)
            paths.adapter(7).mkdir(parents=True)
            scores = RowScores(losses=losses, hits=[0] * len(losses), tokens=[1] * len(losses))
            (paths.adapter(7) / SCORES).write_text(scores.model_dump_json())


@pytest.fixture
def simulate(tmp_path: Path, document: dict[str, Any]) -> Callable[..., Simulated]:
    return lambda **search: Simulated(tmp_path / "sweep", search, document)


def bowl(point: Point) -> float:
    """Return a loss whose minimum, 1, is soon found."""
    return 1 + 0.05 * math.log10(point[RATE] / 1e-3) ** 2 + 0.01 * (point["lora.rank"] != 16)


@pytest.mark.parametrize("algorithm", ["auto", "random", "optuna"])
def test_it_ends_when_another_trial_promises_too_little(algorithm: str, simulate: Callable[..., Simulated]) -> None:
    sweep = simulate(algorithm=algorithm, stop={"gain": "2%", "min_trials": 8})
    number = sweep.run(bowl)
    assert 8 <= number < 40
    ended = sweep.record.search_ended()
    assert ended is not None
    values = [trial.best.value for trial in sweep.record.trials() if trial.best]
    assert (ended.rule, ended.num_ended, ended.share, ended.tokens) == ("gain", number, 0.02, 1000)
    assert ended.best == min(values) < 1.02
    assert ended.expected_gain is not None
    assert ended.expected_gain < 0.02 * ended.best
    assert str(ended).startswith(f"the sweep ends itself after {number} trials: another 1,000 tokens are expected to")
    assert f"less than 2.00%; the best is eval/loss {ended.best:.4g} ({ended.leader})" in str(ended)


def test_it_does_not_end_while_there_is_gain_to_have(simulate: Callable[..., Simulated]) -> None:
    """The loss falls with the rate, faster and faster, up to the end of the axis."""
    sweep = simulate(algorithm="random", stop={"gain": "0.1%"})
    assert sweep.run(lambda point: 3 - 0.4 * math.log10(point[RATE] / 1e-5) ** 1.5 / 3, number=20) == 20
    assert sweep.record.search_ended() is None


def test_it_never_ends_before_its_least_number_of_trials(simulate: Callable[..., Simulated]) -> None:
    assert simulate(stop={"gain": "50%", "min_trials": 5}).run(bowl) == 5


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_leader_that_stands_ends_the_sweep(algorithm: str, simulate: Callable[..., Simulated]) -> None:
    sweep = simulate(algorithm=algorithm, stop={"unmoved": 4, "min_trials": 3})
    losses = iter([5.0, 4.0, 3.0, 2.0, 2.5, math.inf, 2.1, 2.6, 1.0])
    assert sweep.run(lambda _: next(losses)) == 8, "a failed trial counts too"
    ended = sweep.record.search_ended()
    assert ended is not None
    assert (ended.rule, ended.unmoved, ended.best) == ("unmoved", 4, 2.0)
    assert "none of the last 4 has beaten the best before them" in str(ended)


def slightly_better() -> Loss:
    """Return a loss that falls by a ten-thousandth with each trial."""
    values = itertools.count(2.0, -1e-4)
    return lambda _: next(values)


def test_a_lead_that_the_held_out_rows_cannot_tell_is_no_move(simulate: Callable[..., Simulated]) -> None:
    """Rows differ by a hundred times as much as trials do."""

    def noisy(value: float) -> list[float]:
        return [value + 0.01 * ((7 * i + round(1e4 * value)) % 11 - 5) for i in range(40)]

    sweep = simulate(algorithm="random", stop={"unmoved": 4, "min_trials": 3})
    assert sweep.run(slightly_better(), noisy) == 5


def test_a_lead_that_the_held_out_rows_can_tell_is_a_move(simulate: Callable[..., Simulated]) -> None:

    def exact(value: float) -> list[float]:
        return [value * (1 + i / 100) for i in range(40)]

    sweep = simulate(algorithm="random", stop={"unmoved": 4, "min_trials": 3})
    assert sweep.run(slightly_better(), exact, number=15) == 15


def test_trials_that_machines_have_lost_say_nothing(simulate: Callable[..., Simulated]) -> None:
    sweep = simulate(algorithm="random", stop={"unmoved": 4, "min_trials": 3})
    sweep.run(lambda _: 2.0, number=4)
    for name in sweep.paths.trial_ids()[1:]:
        result = next(trial for trial in sweep.record.trials() if trial.trial_id == name)
        lost = result.model_copy(update={"state": TrialState.FAILED, "failure": "infrastructure"})
        write_record(sweep.paths.trial(name).result, lost)
    assert sweep.run(lambda _: 2.0) == 8, "four more after the only one that counts"


def test_only_trials_that_say_something_count_for_the_least_number(simulate: Callable[..., Simulated]) -> None:
    sweep = simulate(algorithm="random", stop={"unmoved": 1, "min_trials": 4})
    sweep.run(lambda _: 2.0, number=3)
    for name in sweep.paths.trial_ids()[:2]:
        result = read_trial(sweep.paths.trial(name), sweep.record.info)
        lost = result.model_copy(update={"state": TrialState.FAILED, "failure": "infrastructure"})
        write_record(sweep.paths.trial(name).result, lost)
    assert sweep.run(lambda _: 2.0) == 6
    ended = sweep.record.search_ended()
    assert ended is not None
    assert ended.num_ended == 4


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_trial_that_machines_lose_says_nothing_at_its_own_end(
    algorithm: str, simulate: Callable[..., Simulated]
) -> None:
    """The search hears of the loss before the driver writes the result; until then the record says RUNNING."""
    sweep = simulate(algorithm=algorithm, stop={"unmoved": 4, "min_trials": 3})
    assert sweep.run(lambda _: 2.0, number=4) == 4
    trial = sweep.search.next_trial()
    sweep.finish(trial.trial_id, dict(trial.config), 1.0, None)
    paths = sweep.paths.trial(trial.trial_id)
    so_far = read_trial(paths, sweep.record.info).model_copy(update={"state": TrialState.RUNNING})
    write_record(paths.progress, so_far)
    paths.result.unlink()
    sweep.search.on_trial_complete(trial.trial_id, error=True)
    assert sweep.record.search_ended() is None
    lost = so_far.model_copy(update={"state": TrialState.FAILED, "failure": "infrastructure"})
    write_record(paths.result, lost)
    assert sweep.run(lambda _: 2.0) == 6
    ended = sweep.record.search_ended()
    assert ended is not None
    assert (ended.best, ended.num_ended) == (2.0, 5)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_the_search_knows_which_trials_run(
    algorithm: str, simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of four drawn trials has no record yet, and the record of another says that it has ended.

    A trial that was lost with an earlier driver has a record and does not run.
    """
    heard: list[list[Point]] = []
    monkeypatch.setattr(ending, "small_gain", lambda _search, _results, running: heard.append(running))
    sweep = simulate(algorithm=algorithm, stop={"gain": "1%", "min_trials": 2})
    search = sweep.begin(4)
    drawn = [search.next_trial() for _ in range(4)]
    sweep.finish("lost", {RATE: 3e-3, "lora.rank": 8}, 2.0, None)
    paths = sweep.paths.trial("lost")
    write_record(paths.progress, read_trial(paths, sweep.record.info).model_copy(update={"state": TrialState.RUNNING}))
    paths.result.unlink()
    for trial in drawn[:3]:
        sweep.finish(trial.trial_id, dict(trial.config), 2.0, None)
    search.on_trial_complete(drawn[0].trial_id, {"eval/loss": 2.0})
    search.save_to_dir(str(tmp_path), "one")
    search = sweep.driver(4)
    search.restore_from_dir(str(tmp_path))
    search.on_trial_complete(drawn[1].trial_id, {"eval/loss": 2.0})
    assert heard == [[plain_values(trial.config) for trial in drawn[2:]]]


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_search_that_has_drawn_all_of_its_trials_does_not_end_itself(
    algorithm: str, simulate: Callable[..., Simulated]
) -> None:
    sweep = simulate(algorithm=algorithm, num_trials=8, stop={"unmoved": 4, "min_trials": 3})
    losses = iter([5.0, 4.0, 3.0, 2.0, 2.5, 2.4, 2.1, 2.6])
    assert sweep.run(lambda _: next(losses)) == 8
    assert sweep.record.search_ended() is None


def test_a_lead_with_damaged_scores_is_a_move(simulate: Callable[..., Simulated]) -> None:
    """An error here would look to Tune as if the trial that ends were lost."""
    sweep = simulate(algorithm="random", stop={"unmoved": 4, "min_trials": 3})
    sweep.run(slightly_better(), lambda value: [value] * 40, number=4)
    (sweep.paths.trial(sweep.paths.trial_ids()[0]).adapter(7) / SCORES).write_text("{")
    assert sweep.run(lambda _: 1.0, lambda value: [value] * 40, number=1) == 5
    assert sweep.record.search_ended() is None


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
@pytest.mark.parametrize("before", [5, 7])
def test_a_resumed_sweep_ends_where_it_would_have_ended(
    algorithm: str, before: int, simulate: Callable[..., Simulated], tmp_path: Path
) -> None:
    losses = iter([5.0, 4.0, 3.0, 2.0, 2.5, 2.4, 2.1, 2.6, 1.0])

    def loss(_: Point) -> float:
        return next(losses)

    sweep = simulate(algorithm=algorithm, stop={"unmoved": 4, "min_trials": 3})
    assert sweep.run(loss, number=before) == before
    sweep.search.save_to_dir(str(tmp_path), "one")
    sweep.search = sweep.driver()
    sweep.search.restore_from_dir(str(tmp_path))
    assert sweep.run(loss) == 8
    sweep.search.save_to_dir(str(tmp_path), "two")
    sweep.search = sweep.driver()
    sweep.search.restore_from_dir(str(tmp_path))
    assert sweep.run(loss) == 8, "a sweep that has ended itself draws nothing when it is resumed"


@pytest.mark.parametrize("algorithm", ["grid", "random", "optuna"])
def test_more_trials_continue_a_sweep_that_has_ended_itself(
    algorithm: str, simulate: Callable[..., Simulated], tmp_path: Path
) -> None:
    number = {"space": {RATE: {"grid": [i * 1e-3 for i in range(1, 9)]}}, "num_trials": None}
    sweep = simulate(
        algorithm=algorithm, stop={"unmoved": 4, "min_trials": 3}, **(number if algorithm == "grid" else {})
    )
    assert sweep.run(lambda _: 2.0) == 5
    sweep.search.save_to_dir(str(tmp_path), "one")
    save_extension(extend_sweep(sweep.record, 8, []))
    sweep.search = sweep.driver()
    sweep.search.restore_from_dir(str(tmp_path))
    assert sweep.run(lambda _: 2.0) == 8
    assert len({trial.config.training.learning_rate for trial in sweep.record.trials()}) == 8


def test_the_record_of_an_earlier_driver_holds_even_if_tune_lost_the_last_end(
    simulate: Callable[..., Simulated], tmp_path: Path
) -> None:
    sweep = simulate(algorithm="random", stop={"unmoved": 4, "min_trials": 3})
    sweep.run(lambda _: 2.0, number=4)
    sweep.search.save_to_dir(str(tmp_path), "one")
    assert sweep.run(lambda _: 2.0) == 5
    sweep.search = sweep.driver()
    sweep.search.restore_from_dir(str(tmp_path))
    assert sweep.run(lambda _: 2.0) == 5


@pytest.mark.parametrize("algorithm", ["auto", "random"])
@pytest.mark.parametrize("values", [{RATE: 0.5}, {"lora.rank": 8}, {"training.steps": 9}])
def test_added_trials_outside_the_space_say_nothing_about_the_gain(
    algorithm: str, values: Point, simulate: Callable[..., Simulated]
) -> None:
    """A point outside of its axis, or without a value on each, would raise in the model."""
    sweep = simulate(algorithm=algorithm, stop={"gain": "2%", "min_trials": 4})
    sweep.search.take_in("added", None)
    sweep.finish("added", values, 1.5, None)
    sweep.search.on_trial_complete("added", {"eval/loss": 1.5})
    assert sweep.run(bowl) < 40
    assert sweep.record.search_ended() is not None
