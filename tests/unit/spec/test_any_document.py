"""Whatever a document holds, it becomes an experiment or an error that is meant for people."""

import json
from contextlib import suppress
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.spec.load import override_spec, parse_values
from orchestrator.spec.manual.schema import spec_schema

BOUNDED = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)


def _names(schema: Any) -> set[str]:
    """Return the names of all fields, kinds and values in the schema."""
    if isinstance(schema, dict):
        named = {*schema.get("properties", {})} | {each for each in schema.get("enum", []) if isinstance(each, str)}
        return named.union(*map(_names, schema.values())) if schema else named
    return set().union(*map(_names, schema)) if isinstance(schema, list) else set()


NAMES = sorted(_names(spec_schema()))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [*NAMES, "1e-4", "a/b", "../x", "{question}", "*.jsonl", "lora.rank", 10**400, [10**400, 10**401]]
    )
    | st.dates()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def _paths(document: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(document, dict):
        return [path]
    return [
        *([path] if path else []),
        *(each for key, value in document.items() for each in _paths(value, (*path, key))),
    ]


VALID: dict[str, Any] = {
    "base": {"model": "embedded"},
    "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
    "search": {"space": {"lora.rank": {"choice": [4, 8]}, "training.learning_rate": {"loguniform": [1e-4, 1e-2]}}},
}
FIELDS = _paths(SweepSpec.model_validate(VALID).model_dump(mode="json"))


def _with(document: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(document))
    inner = changed
    for key in path[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def _spec_of(document: Any) -> SweepSpec | None:
    """Return the experiment; None if the document is refused."""
    try:
        return parse_spec(document)
    except OrchestratorError:
        return None


@BOUNDED
@given(st.dictionaries(st.sampled_from(sorted(SweepSpec.model_fields)) | st.text(max_size=4), VALUES, max_size=3))
def test_any_document_is_an_experiment_or_an_error(document: dict[str, Any]) -> None:
    _spec_of(document)


@BOUNDED
@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_a_field_is_accepted_or_an_error(path: tuple[str, ...], value: Any) -> None:
    spec = _spec_of(_with(VALID, path, value))
    if spec is not None:
        assert parse_spec(spec.model_dump(mode="json")) == spec
        assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec


@BOUNDED
@given(st.sampled_from(FIELDS), VALUES)
def test_a_file_with_any_value_is_loaded_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[str, ...], value: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(_with(VALID, path, value)), encoding="utf-8", errors="surrogatepass")
    try:
        spec = load_spec(file)
    except OrchestratorError:
        return
    file.write_text(spec.model_dump_json(), encoding="utf-8")
    assert load_spec(file) == spec


@BOUNDED
@given(st.text(max_size=40), st.text(max_size=40) | VALUES.map(lambda value: yaml.safe_dump(value, width=10_000)))
def test_any_override_is_applied_or_an_error(path: str, value: str) -> None:
    for override in (f"{path}={value}", f"search.space.lora.rank={value}", value):
        with suppress(OrchestratorError):
            parse_values([override])
            override_spec(json.loads(json.dumps(VALID)), [override], "any")


@BOUNDED
@given(st.binary(max_size=60) | st.text(alphabet="{}[]&*!|>-?:,'\"#% \n\tab1.", max_size=60).map(str.encode))
def test_any_bytes_are_an_experiment_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(content)
    with pytest.raises(OrchestratorError, match=r"bytes\.yaml"):
        load_spec(file)


@pytest.mark.parametrize(
    "override", ["lora.rank=N", "search.space.lora.rank={uniform: [1, N]}", "search.budget.tokens=N"]
)
def test_a_number_that_no_float_holds_is_an_error(override: str) -> None:
    with pytest.raises(SpecError, match="a number of 1329 bits is too large"):
        override_spec(json.loads(json.dumps(VALID)), [override.replace("N", str(10**400))], "any")
    with pytest.raises(ValidationError, match="too large"):
        SweepSpec.model_validate_json(
            json.dumps(VALID | {"search": {"space": {"lora.rank": {"uniform": [1, 10**400]}}}})
        )
