"""What a search is where the experiment does not say."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.spec.default_search import DEFAULT_SPACE

Document = dict[str, Any]
SPACE = {"training.learning_rate": {"loguniform": [1e-5, 1e-2]}}


@pytest.mark.parametrize(
    "search", [{"num_trials": 6}, {"budget": {"tokens": 10**6}}, {"algorithm": "auto", "num_trials": 6}]
)
def test_a_number_of_trials_or_a_budget_is_enough(document: Document, search: Document) -> None:
    spec = parse_spec(document | {"search": search})
    assert spec.search.algorithm == "auto"
    assert set(spec.search.space) == set(DEFAULT_SPACE)
    assert spec.search.total_trials == search.get("num_trials", 64)
    assert SweepSpec.model_validate(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize("search", [None, {}, {"num_trials": 1}, {"seed": 3}, {"algorithm": "random", "num_trials": 6}])
def test_otherwise_there_is_one_trial_as_before(document: Document, search: Document | None) -> None:
    spec = parse_spec(document | ({} if search is None else {"search": search}))
    assert (spec.search.space, spec.search.total_trials) == ({}, 1)


@pytest.mark.parametrize(
    ("sections", "fixed"),
    [
        ({"lora": {"rank": 8}}, {"lora.rank"}),
        ({"training": {"steps": 50}}, {"training.batch_size"}),
        ({"training": {"epochs": 2}}, set()),
        ({"training": {"learning_rate": 1e-3, "batch_size": 2}}, {"training.learning_rate", "training.batch_size"}),
    ],
)
def test_what_the_experiment_gives_is_not_searched(document: Document, sections: Document, fixed: set[str]) -> None:
    spec = parse_spec(document | sections | {"search": {"num_trials": 6}})
    assert set(spec.search.space) == set(DEFAULT_SPACE) - fixed


def test_a_tied_field_is_not_searched(document: Document) -> None:
    spec = parse_spec(document | {"search": {"num_trials": 6, "tied": {"lora.alpha": "2 * lora.rank"}}})
    assert set(spec.search.space) == set(DEFAULT_SPACE) - {"lora.alpha"}


def test_a_space_that_is_written_stays_in_force(document: Document) -> None:
    spec = parse_spec(document | {"search": {"space": SPACE}})
    assert (spec.search.algorithm, [*spec.search.space]) == ("auto", [*SPACE])


def test_a_search_that_is_set_as_a_whole_keeps_its_number_of_trials(tmp_path: Path, document: Document) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(document | {"search": {"space": SPACE, "num_trials": 9}}))
    assert load_spec(file, ["search={num_trials: 6}"]).search.total_trials == 6
    assert load_spec(file, ["training.learning_rate=1e-3"]).search.total_trials == 1, "nothing is searched any more"


def test_nothing_left_to_search_is_refused(document: Document) -> None:
    document |= {"lora": {"rank": 8, "alpha": 8, "dropout": 0.0}, "training": {"steps": 9, "learning_rate": 1e-3}}
    with pytest.raises(SpecError, match="search: 6 trials are asked for and no space is given, but the experiment"):
        parse_spec(document | {"search": {"num_trials": 6}})


@pytest.mark.parametrize("kind", ["hyperband", "pbt", "pb2"])
def test_schedulers_whose_trials_all_exist_at_the_start_draw_at_random(document: Document, kind: str) -> None:
    document |= {"training": {"steps": 90, "eval_steps": 10}, "scheduler": {"kind": kind}}
    assert parse_spec(document | {"search": {"space": SPACE}}).search.algorithm == "random"
    with pytest.raises(SpecError, match="does not go with search"):
        parse_spec(document | {"search": {"space": SPACE, "algorithm": "auto"}})


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"prior": {"lora.rank": 8}}, "prior: lora.rank is not searched; axes: training.learning_rate"),
        ({"prior": {"training.learning_rate": 1.0}}, "prior: 1.0 is not a value of training.learning_rate"),
        ({"prior": {"training.learning_rate": 1e-3}, "algorithm": "optuna"}, "prior belongs to algorithm auto"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(document: Document, search: Document, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(document | {"search": {"space": SPACE} | search})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"search": {"space": {"training.seed": {"choice": [1, 2]}}}},
            "repeats differ in training.seed, which is s",
        ),
        (
            {"search": {"space": SPACE, "tied": {"training.seed": "3"}}},
            "differ in training.seed, which is tied",
        ),
        (
            {"search": {"space": SPACE}, "scheduler": {"kind": "pbt"}},
            "search.repeats runs finalists again with the values that they began with, but scheduler.kind pbt",
        ),
    ],
)
def test_repeats_that_make_no_sense_are_refused(document: Document, sections: Document, message: str) -> None:
    sections["search"]["repeats"] = 3
    with pytest.raises(SpecError, match=message):
        parse_spec(document | {"training": {"steps": 90, "eval_steps": 10}} | sections)
