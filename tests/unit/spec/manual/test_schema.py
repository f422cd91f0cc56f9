"""The JSON Schema and the loader accept the same experiments, as far as a schema can express it."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import Field, ValidationError

from orchestrator.errors import SpecError
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.spec.load import _Loader
from orchestrator.spec.manual.schema import schema_of, spec_schema
from orchestrator.spec.sections import Section

FOLDER = Path(__file__).parents[4] / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))
VALIDATOR = Draft202012Validator(spec_schema())
EVERY_FIELD = yaml.load((FOLDER / "every-field.yaml").read_text(encoding="utf-8"), _Loader)

VALUES = [None, True, -1, 0, 0.5, 1, 7, 8, 10**6, "", "text", "auto", "none", [], ["q_proj"], [3], {}, {"x": 1}]
"""Values tried in every field."""

AXES = ("search", "space")
METRIC = ("search", "metric")
MAPS = ("space", "tied", "prior", "rank_pattern", "alpha_pattern", "roles")


def test_the_schema_is_valid() -> None:
    Draft202012Validator.check_schema(spec_schema())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_experiments_fit_the_schema(file: Path) -> None:
    load_spec(file)
    assert _faults(yaml.load(file.read_text(encoding="utf-8"), _Loader)) == []


def _paths(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return every field of a document, except those under `space` and `tied`, which have separate tests."""
    found: list[tuple[str, ...]] = []
    for name, value in document.items():
        found.append((name,))
        if isinstance(value, dict) and name not in MAPS:
            found += [(name, *below) for below in _paths(value)]
    return found


@pytest.mark.parametrize("path", _paths(EVERY_FIELD), ids=".".join)
def test_schema_and_loader_agree_on_any_value_in_any_field(path: tuple[str, ...]) -> None:
    verdicts = set()
    for value in VALUES:
        document = copy.deepcopy(EVERY_FIELD)
        _put(document, path, value)
        verdict = _is_mistyped(document)
        assert bool(_faults(document)) == verdict, f"{value!r}: the loader {'refuses' if verdict else 'accepts'} it"
        verdicts.add(verdict)
    assert True in verdicts, "no value was wrong"


@pytest.mark.parametrize("path", [(), *(path for path in _paths(EVERY_FIELD) if path[-1] not in MAPS)])
def test_an_unknown_field_is_refused_everywhere(path: tuple[str, ...]) -> None:
    document = copy.deepcopy(EVERY_FIELD)
    section = _get(document, path)
    if not isinstance(section, dict):
        return
    section["rnk"] = 3
    assert len(_faults(document)) == 1
    with pytest.raises(SpecError, match="rnk: unknown field"):
        parse_spec(document)


RIGHT_AXES = [
    {"choice": [8]},
    {"choice": [8, 16]},
    {"grid": [8, 16]},
    {"randint": [4, 9]},
    {"loguniform": [1e-5, 1e-3]},
    {"loguniform": [1, 2]},
    {"uniform": [0, 0.5]},
]
WRONG_AXES: list[Any] = [
    {},
    {"choise": [8]},
    {"choice": 8},
    {"choice": []},
    {"choice": [8], "grid": [8]},
    {"kind": "choice", "values": [8]},
    [8, 16],
    8,
    None,
    {"randint": [4, 9.5]},
    {"randint": [True, 9]},
    {"randint": [4]},
    {"uniform": [1, 2, 3]},
    {"uniform": ["a", "b"]},
    {"loguniform": [0, 1]},
    {"loguniform": [-1, 1]},
]


@pytest.mark.parametrize("axis", [*RIGHT_AXES, *WRONG_AXES], ids=str)
def test_schema_and_loader_agree_on_axes(axis: Any) -> None:
    document = copy.deepcopy(EVERY_FIELD)
    # On a field that takes every value of the axis.
    path = "lora.rank" if isinstance(axis, dict) and {"choice", "grid", "randint"} & {*axis} else "training.warmup"
    document["search"] = {"space": {path: axis}}
    if isinstance(axis, dict) and "grid" in axis:
        document["search"]["algorithm"] = "grid"
    assert bool(_faults(document)) == _is_refused(document) == (axis in WRONG_AXES)


@pytest.mark.parametrize(
    ("path", "is_right"),
    [
        ("training.seed", True),
        ("base.quantization", True),
        ("lora.rnk", False),
        ("rank", False),
        ("base.model", False),
        ("data.max_length", False),
        ("resources.max_failures", False),
    ],
)
def test_schema_and_loader_agree_on_searched_and_tied_fields(path: str, is_right: bool) -> None:
    value = {"choice": ["nf4"] if path.startswith("base") else [1, 2]}
    for search in ({"space": {path: value}}, {"tied": {path: "3"}}):
        if is_right and "tied" in search and path.startswith("base"):
            continue  # arithmetic gives no text
        document = EVERY_FIELD | {"search": search}
        assert bool(_faults(document)) == _is_refused(document) == (not is_right)


BEYOND = [
    "training={steps: 3, epochs: 1}",
    "data.held_out={share: 0.1, count: 3}",
    "data.format=text",
    "search.metric=eval/f1",
    "search.space={lora.rank: {choice: [0]}}",
    "search.space={lora.rank: {choice: [8, 8]}}",
    "search.space={training.warmup: {uniform: [2, 1]}}",
    "search.tied={lora.alpha: rank}",
    "training.steps=8.0",
]


@pytest.mark.parametrize("override", BEYOND)
def test_rules_between_fields_are_left_to_check(override: str) -> None:
    """A schema cannot express these rules. If one of these overrides fails here, the schema has learned it."""
    field, _, text = override.partition("=")
    document = copy.deepcopy(EVERY_FIELD)
    _put(document, tuple(field.split(".")), yaml.load(text, _Loader))
    assert _faults(document) == []
    with pytest.raises(SpecError):
        load_spec(FOLDER / "every-field.yaml", [override])


class Left(Section):
    """The left one."""

    kind: Literal["left"] = "left"
    """Tells it."""
    size: Annotated[int, Field(ge=1)] = 1
    """Its size."""


class Right(Section):
    """The right one."""

    kind: Literal["right"] = "right"
    """Tells it."""
    weight: float = 0.5
    """Its weight."""


class Either(Section):
    """One of two."""

    side: Annotated[Left | Right, Field(discriminator="kind")] = Left()
    """Which one."""


@pytest.mark.parametrize(
    ("side", "is_right"),
    [
        ({"kind": "left"}, True),
        ({"kind": "right", "weight": 1}, True),
        ({"kind": "left", "weight": 1}, False),
        ({"kind": "left", "size": 0}, False),
        ({"kind": "up"}, False),
        ({"size": 2}, False),
        ({}, False),
    ],
)
def test_members_of_a_union_are_recognized_by_their_mark(side: dict[str, Any], is_right: bool) -> None:
    validator = Draft202012Validator(schema_of(Either))
    assert validator.is_valid({"side": side}) is is_right
    if is_right:
        Either.model_validate({"side": side})
    else:
        with pytest.raises(ValidationError):
            Either.model_validate({"side": side})


def test_every_field_is_documented() -> None:
    def fields(node: Any) -> list[dict[str, Any]]:
        if not isinstance(node, dict):
            return []
        own = list(node.get("properties", {}).values())
        return own + [field for each in [*node.get("$defs", {}).values()] for field in fields(each)]

    found = fields(spec_schema())
    assert len(found) > 60
    assert [field for field in found if not field.get("description")] == []


def test_the_command_prints_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "schema"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == spec_schema()


def _faults(document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(document)]


def _is_refused(document: dict[str, Any]) -> bool:
    try:
        parse_spec(document)
    except SpecError:
        return True
    return False


def _is_mistyped(document: dict[str, Any]) -> bool:
    """Whether a type or a bound refuses the document; validators count only if they check a single field's form."""
    try:
        SweepSpec.model_validate(document)
    except ValidationError as error:
        return any(fault["type"] != "value_error" or fault["loc"][:2] in (AXES, METRIC) for fault in error.errors())
    return False


def _put(document: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    _get(document, path[:-1])[path[-1]] = value


def _get(document: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = document
    for key in path:
        value = value[key]
    return value
