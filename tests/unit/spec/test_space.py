"""Search spaces: steps, conditions, points to try first, and the number of trials."""

import random
from collections import Counter
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.axes import Axis, FloatDomain, IndexDomain, IntDomain

Document = dict[str, Any]

OPTIMIZERS = {"choice": ["adamw_torch", "sgd", "adafactor"]}
DECAY = {"uniform": [0.0, 0.1], "when": {"training.optimizer": "adamw_torch"}}


def spec(document: Document, **search: Any) -> SweepSpec:
    return parse_spec(document | {"search": search})


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ({"quniform": [0, 0.3, 0.1]}, [0.0, 0.1, 0.2, 0.3]),
        ({"quniform": [0.05, 0.3, 0.1]}, [0.05, 0.15, 0.25]),
        ({"qloguniform": [0.1, 0.4, 0.1]}, [0.1, 0.2, 0.3, 0.4]),
        ({"qrandint": [8, 33, 8]}, [8, 16, 24, 32]),
        ({"qlograndint": [8, 32, 8]}, [8, 16, 24, 32]),
    ],
)
def test_values_of_a_range_with_steps(written: dict[str, Any], values: list[Any]) -> None:
    axis = Axis.model_validate(written)
    assert axis.listed() == values
    assert axis.probes() == [values[0], values[-1]]
    drawn, rng = axis.domain(), random.Random(0)
    assert isinstance(drawn, FloatDomain)
    seen = Counter(axis.decode(rng.uniform(drawn.low, drawn.high)) for _ in range(4000))
    assert sorted(seen) == values
    assert all(type(value) is type(values[0]) for value in seen)
    if not drawn.is_log:
        assert max(seen.values()) < 1.2 * min(seen.values()), "the ends are as likely as the others"
    assert [axis.holds(value) for value in values] == [True] * len(values)
    assert not axis.holds(values[0] + 0.4 * (values[1] - values[0]))


def test_the_nearest_value_of_a_range_belongs_to_it() -> None:
    for kind in ("randint", "lograndint"):
        axis = Axis.model_validate({kind: [2, 9]})
        nearest = [axis.nearest(number) for number in (0.1, 2.4, 4.8, 8.9)]
        assert nearest == [2, 2, 5, 8]
        assert all(map(axis.holds, nearest))


@pytest.mark.parametrize(
    ("written", "drawn"),
    [
        ({"choice": ["a", None, [1]]}, IndexDomain(3)),
        ({"randint": [2, 9]}, IntDomain(2, 8, False)),
        ({"lograndint": [2, 9]}, IntDomain(2, 8, True)),
        ({"uniform": [0, 1]}, FloatDomain(0, 1, False)),
        ({"loguniform": [1e-5, 1e-3]}, FloatDomain(1e-5, 1e-3, True)),
        ({"qloguniform": [0.1, 0.4, 0.25]}, FloatDomain(0.1, 0.475, True)),
    ],
)
def test_what_a_searcher_draws(written: dict[str, Any], drawn: Any) -> None:
    axis = Axis.model_validate(written)
    assert axis.domain() == drawn
    for value in axis.probes():
        assert axis.decode(axis.encode(value)) == value


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"quniform": [0, 1]}, "quniform takes three numbers, [low, high, step]"),
        ({"qrandint": [1, 9, 0.5]}, "qrandint takes three whole numbers"),
        ({"quniform": [0, 1, 0]}, "must hold 0 < step <= high - low"),
        ({"quniform": [0, 1, 2]}, "must hold 0 < step <= high - low"),
        ({"qloguniform": [0, 1, 0.1]}, "qloguniform must hold low > 0"),
        ({"lograndint": [0, 9]}, "lograndint must hold low > 0"),
        ({"uniform": [0, 1], "when": "lora.bias"}, "when takes one searched field and its values"),
        ({"uniform": [0, 1], "when": {}}, "when takes one searched field"),
        ({"when": {"lora.bias": "all"}}, "must be one of {choice: [...]}"),
    ],
)
def test_a_wrong_range_is_refused_with_what_is_right(document: Document, written: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(document, space={"lora.dropout": written})
    assert "search.space.lora.dropout" in str(caught.value)
    assert message in str(caught.value)


def test_a_field_with_a_condition_exists_only_there(document: Document) -> None:
    document["training"] = {"weight_decay": 0.05}
    space = {"training.weight_decay": DECAY, "training.optimizer": OPTIMIZERS}
    made = spec(document, space=space)
    assert parse_spec(made.model_dump(mode="json")) == made
    with_it = made.trial_config({"training.weight_decay": 0.01, "training.optimizer": "adamw_torch"})
    assert with_it.training.weight_decay == 0.01
    without = made.trial_config({"training.weight_decay": 0.01, "training.optimizer": "sgd"})
    assert without.training.weight_decay == 0.05, "the file's own"
    assert without.varied == {"training.optimizer": "sgd"}


def test_conditions_may_depend_on_each_other(document: Document) -> None:
    space = {
        "training.optimizer": OPTIMIZERS,
        "training.schedule": {"choice": ["cosine", "constant"], "when": {"training.optimizer": ["sgd", "adafactor"]}},
        "training.warmup": {"uniform": [0.0, 0.1], "when": {"training.schedule": "cosine"}},
    }
    made = spec(document, space=space).search
    point = {"training.optimizer": "sgd", "training.schedule": "cosine", "training.warmup": 0.1}
    assert made.active(point) == point
    assert made.active(point | {"training.optimizer": "adamw_torch"}) == {"training.optimizer": "adamw_torch"}
    assert made.needed("training.warmup") == {"training.schedule": "cosine", "training.optimizer": "sgd"}


def test_values_are_checked_at_points_where_they_exist(document: Document) -> None:
    dropout = {"uniform": [0.5, 1.5], "when": {"training.optimizer": "sgd"}}
    with pytest.raises(SpecError, match=r"space\.lora\.dropout: the value 1\.5 gives lora\.dropout"):
        spec(document, space={"training.optimizer": OPTIMIZERS, "lora.dropout": dropout})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"lora.dropout": {"uniform": [0, 0.5], "when": {"lora.rank": 8}}},
            "listed values, got lora.rank; available: none",
        ),
        (
            {"lora.dropout": {"uniform": [0, 0.5], "when": {"lora.rank": 8}}, "lora.rank": {"randint": [1, 9]}},
            "when needs a searched field with listed values, got lora.rank",
        ),
        (
            {"lora.dropout": {"uniform": [0, 0.5], "when": {"lora.rank": [8, 9]}}, "lora.rank": {"choice": [4, 8]}},
            "9 is not a value of lora.rank: [4, 8]",
        ),
        (
            {
                "lora.rank": {"choice": [4, 8], "when": {"lora.bias": "all"}},
                "lora.bias": {"choice": ["all", "none"], "when": {"lora.rank": 8}},
            },
            "space.lora.rank: exists only if lora.bias does, which exists only if lora.rank does",
        ),
    ],
)
def test_a_wrong_condition_is_refused(document: Document, space: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(document, space=space)
    assert message in str(caught.value)


def test_a_grid_does_not_count_values_of_fields_that_do_not_exist(document: Document) -> None:
    decays = {"grid": [0.0, 0.1], "when": {"training.optimizer": "adamw_torch"}}
    space = {"training.optimizer": {"grid": OPTIMIZERS["choice"]}, "training.weight_decay": decays}
    made = spec(document, algorithm="grid", space=space).search
    assert made.total_trials == 4
    assert [*made.points()] == [
        {"training.optimizer": "adamw_torch", "training.weight_decay": 0.0},
        {"training.optimizer": "adamw_torch", "training.weight_decay": 0.1},
        {"training.optimizer": "sgd"},
        {"training.optimizer": "adafactor"},
    ]


FIRST_SPACE = {
    "training.optimizer": OPTIMIZERS,
    "training.weight_decay": DECAY,
    "lora.rank": {"qrandint": [8, 32, 8]},
    "lora.target_modules": {"choice": ["all-linear", ["q_proj"]]},
}
POINT = {"training.optimizer": "sgd", "lora.rank": 16, "lora.target_modules": ["q_proj"]}


def test_points_to_try_first(document: Document) -> None:
    made = spec(document, space=FIRST_SPACE, first=[POINT, POINT | {"training.optimizer": "adafactor"}])
    assert parse_spec(made.model_dump(mode="json")).search.first[0] == POINT


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"first": [POINT | {"lora.rnk": 8}]}, "first.0: lora.rnk is not searched; axes: training.optimizer, "),
        ({"first": [POINT | {"lora.rank": 12}]}, "first.0: 12 is not a value of lora.rank: {'qrandint': [8, 32, 8]}"),
        ({"first": [POINT | {"lora.rank": 16.0}]}, "first.0: 16.0 is not a value of lora.rank"),
        ({"first": [POINT, {"lora.rank": 8}]}, "first.1: needs a value for training.optimizer"),
        (
            {"first": [POINT | {"training.optimizer": "adamw_torch"}]},
            "first.0: needs a value for training.weight_decay",
        ),
        (
            {"first": [POINT | {"training.weight_decay": 0.1}]},
            "training.weight_decay does not exist there: it is searched when training.optimizer is adamw_torch",
        ),
        ({"first": [POINT, POINT]}, "first.1 repeats first.0: {'training.optimizer': 'sgd'"),
        ({"first": [POINT, POINT], "num_trials": 1}, "first holds 2 points for 1 trial; give num_trials of 2"),
        (
            {"algorithm": "grid", "space": {"lora.rank": {"grid": [8]}}, "first": [{"lora.rank": 8}]},
            "algorithm grid tries all",
        ),
    ],
)
def test_a_wrong_first_point_is_refused(document: Document, search: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(document, **({"space": FIRST_SPACE} | search))
    assert message in str(caught.value)
