"""The number of points in a search space: no trial repeats one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import SweepSpec, load_spec, parse_spec

Document = dict[str, Any]


def _spec(document: Document, **search: Any) -> SweepSpec:
    return parse_spec(document | {"search": search})


@pytest.mark.parametrize(
    ("space", "points"),
    [
        ({"lora.rank": {"choice": [1, 2]}, "lora.dropout": {"quniform": [0.0, 0.3, 0.1]}}, 8),
        ({"lora.rank": {"randint": [4, 8]}, "training.seed": {"qrandint": [1, 9, 4]}}, 12),
        ({"lora.rank": {"choice": [1, 2]}, "lora.dropout": {"uniform": [0.0, 0.3]}}, math.inf),
        (
            {
                "training.optimizer": {"choice": ["sgd", "adamw_torch", "adafactor"]},
                "training.weight_decay": {"choice": [0.0, 0.1], "when": {"training.optimizer": ["sgd", "adamw_torch"]}},
                "lora.rank": {"choice": [1, 2, 3], "when": {"training.weight_decay": 0.1}},
            },
            2 * (1 + 3) + 1,
        ),
    ],
)
def test_number_of_points(document: Document, space: Document, points: float) -> None:
    search = _spec(document, space=space).search
    assert search.num_points == points
    if points < math.inf:
        assert len({repr(point) for point in search.points()}) == points


@pytest.mark.parametrize("algorithm", ["random", "optuna", "hyperopt"])
def test_more_trials_than_points_are_refused(document: Document, algorithm: str) -> None:
    space = {"lora.rank": {"choice": [4, 8]}, "lora.dropout": {"choice": [0.0, 0.1]}}
    message = (
        "search.num_trials: 8 trials would repeat points, because the space has 4; give at most 4, or algorithm grid"
    )
    with pytest.raises(SpecError, match=message):
        _spec(document, algorithm=algorithm, space=space, num_trials=8)
    assert _spec(document, algorithm=algorithm, space=space, num_trials=4).search.total_trials == 4


@pytest.mark.parametrize("kind", ["choice", "grid"])
@pytest.mark.parametrize(
    ("path", "values", "message"),
    [
        ("training.weight_decay", [0.1, 0, 0.0], "0 and 0.0 are the same value, 0.0;"),
        ("training.learning_rate", [1, 1.0], "1 and 1.0 are the same value, 1.0;"),
    ],
)
def test_equal_values_in_a_list_are_refused(
    document: Document, kind: str, path: str, values: list[Any], message: str
) -> None:
    algorithm = "grid" if kind == "grid" else "random"
    with pytest.raises(SpecError, match=f"search.space.{path}: {message} leave one out"):
        _spec(document, algorithm=algorithm, space={path: {kind: values}})


def test_setting_a_searched_field_limits_the_trials_to_the_points_left(document: Document, tmp_path: Path) -> None:
    """A number of trials that is requested with it is not lowered but refused."""
    space = {"lora.rank": {"choice": [4, 8, 16]}, "training.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(document | {"search": {"space": space, "num_trials": 8}}))
    assert load_spec(file).search.num_trials == 8
    assert load_spec(file, ["lora.rank=8"]).search.num_trials == 8
    assert load_spec(file, ["training.learning_rate=1e-4"]).search.num_trials == 3
    assert load_spec(file, ["training.learning_rate=1e-4", "lora.rank=8"]).search.total_trials == 1
    with pytest.raises(SpecError, match="8 trials would repeat points, because the space has 3"):
        load_spec(file, ["training.learning_rate=1e-4", "search.num_trials=8"])
