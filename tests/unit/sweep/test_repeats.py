"""The experiment that runs finalists again with other seeds."""

from typing import Any

import pytest

from orchestrator.record import TrialResult, TrialState
from orchestrator.spec import parse_spec
from orchestrator.spec.search import SEED
from orchestrator.sweep.repeats import repeats_of

Document = dict[str, Any]
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
