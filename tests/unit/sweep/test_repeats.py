"""The experiment that runs finalists again with other seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.bundle import SCORES, WEIGHTS, Facts, seal
from orchestrator.record import RowScores, SweepPaths, TrialResult, TrialState, read_sweep
from orchestrator.spec import parse_spec
from orchestrator.spec.search import SEED
from orchestrator.sweep.repeats import finalists, repeats_of

Document = dict[str, Any]
MakeSweep = Callable[..., SweepPaths]
COMPLETE: Document = {"state": TrialState.COMPLETE, "metric": "eval/loss", "mode": "min"}
SPACE = {
    "training.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "lora.rank": {"choice": [8, 16]},
    "lora.dropout": {"choice": [0.0, 0.1], "when": {"lora.rank": 16}},
}


@pytest.mark.parametrize("kind", ["none", "asha"])
def test_each_finalist_has_its_values_and_every_other_seed(document: Document, kind: str) -> None:
    search = {"space": SPACE, "tied": {"lora.alpha": "2 * lora.rank"}, "num_trials": 9, "repeats": 3}
    training = {"seed": 7, "steps": 90, "eval_steps": 10}
    spec = parse_spec(
        document | {"search": search | {"budget": {"tokens": 9}}, "training": training, "scheduler": {"kind": kind}}
    )
    points = [
        {"training.learning_rate": 1.2345e-3, "lora.rank": 16, "lora.dropout": 0.1},
        {"training.learning_rate": 2e-4, "lora.rank": 8},
    ]
    trials = [
        TrialResult(
            trial_id=name, state=TrialState.COMPLETE, config=spec.trial_config(p), metric="eval/loss", mode="min"
        )
        for name, p in zip("ab", points, strict=True)
    ]
    again = repeats_of(spec, trials)
    assert again.search.total_trials == 4
    configs = [again.trial_config(point) for point in again.search.first]
    assert [config.training.seed for config in configs] == [8, 9, 8, 9]
    for config, trial in zip(configs, [trials[0], trials[0], trials[1], trials[1]], strict=True):
        assert {path: value for path, value in config.varied.items() if path != SEED} == trial.config.varied
        assert config.lora == trial.config.lora
    assert (again.scheduler.kind, again.search.repeats, again.search.budget.tokens) == ("none", 1, None)


def test_points_of_a_grid_are_repeated(document: Document) -> None:
    search = {"algorithm": "grid", "space": {"lora.rank": {"grid": [8, 16]}}, "repeats": 2}
    spec = parse_spec(document | {"search": search})
    trial = TrialResult(trial_id="a", config=spec.trial_config({"lora.rank": 16}), **COMPLETE)
    assert repeats_of(spec, [trial]).search.first == [{"lora.rank": 16, SEED: 1}]


def test_finalists_are_whole_trials_and_at_least_two(tmp_path: Path, make_sweep: MakeSweep) -> None:
    """Rows differ by the trials' levels only, so that every lead is significant; the leader was stopped."""
    levels = {"stopped": 0.9, "a": 1.0, "b": 1.1, "c": 1.5}
    states = {name: "STOPPED" if name == "stopped" else "COMPLETE" for name in levels}
    paths = make_sweep(tmp_path / "s", {name: (states[name], level) for name, level in levels.items()})
    for name, level in levels.items():
        scores = RowScores(losses=[level * (1 + i / 100) for i in range(20)], hits=[0] * 20, tokens=[1] * 20)
        folder = paths.trial(name).adapter(7)
        (folder / SCORES).write_text(scores.model_dump_json())
        (folder / WEIGHTS).write_bytes(b"weights")
        seal(folder, Facts(format="adapter", base={}, versions={}, metrics={}))
    assert [trial.trial_id for trial in finalists(read_sweep(paths.root))] == ["a", "b"]
