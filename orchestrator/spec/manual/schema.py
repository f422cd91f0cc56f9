"""The JSON Schema of an experiment file, for editors: what `load_spec` accepts, as far as a schema can express it.

Rules between fields (steps or epochs, rungs at evaluations) cannot be expressed; `orchestrator check` knows them all.
"""

import inspect
from typing import Any, get_args

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from orchestrator.spec.axes import AXIS_KINDS, Axis
from orchestrator.spec.axis_checks import check_searchable
from orchestrator.spec.manual.docstrings import field_docstrings
from orchestrator.spec.sections import Section
from orchestrator.spec.sweep_spec import SweepSpec

_WHEN = field_docstrings(Axis)["when"]


def spec_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a whole experiment."""
    schema = schema_of(SweepSpec)
    names = {"enum": _searchable()}
    search = schema["$defs"]["SearchSection"]["properties"]
    search["space"]["propertyNames"] = search["tied"]["propertyNames"] = names
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "Experiment",
        **schema,
        "description": "An experiment of the QLoRA orchestrator.",
    }


def schema_of(model: type[Section]) -> dict[str, Any]:
    """Return the JSON Schema of what one model reads; each section is a definition of its own."""
    schema = model.model_json_schema(schema_generator=_AsWritten, mode="validation")
    return {key: schema[key] for key in sorted(schema, key=lambda key: key == "$defs")}


class _AsWritten(GenerateJsonSchema):
    """pydantic's generator without titles, and with axes in the form in which they are written."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        written = _axis() if schema["cls"] is Axis else super().model_schema(schema)
        if schema["cls"] is not Axis:
            for name, sentence in field_docstrings(schema["cls"]).items():
                if name in written.get("properties", {}):
                    written["properties"][name]["description"] = sentence
        written.pop("title", None)
        return written

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        """Require the field that tells the members apart, although it has a default, except for the default member."""
        written, discriminator = super().tagged_union_schema(schema), schema["discriminator"]
        if isinstance(discriminator, str):
            return written | {"required": [discriminator]}
        assert callable(discriminator)
        members = zip(schema["choices"], written["oneOf"], strict=True)
        required = {"required": ["kind"]}
        return {"oneOf": [member if tag == discriminator({}) else member | required for tag, member in members]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _axis() -> JsonSchemaValue:
    kinds = {kind: _values(Axis.model_construct(kind=kind, values=[])) for kind in AXIS_KINDS}
    return {
        "type": "object",
        "description": inspect.getdoc(Axis),
        "properties": kinds
        | {"when": {"type": "object", "description": _WHEN, "minProperties": 1, "maxProperties": 1}},
        "additionalProperties": False,
        "oneOf": [{"required": [kind]} for kind in kinds],
    }


def _values(axis: Axis) -> JsonSchemaValue:
    if axis.is_discrete:
        return {"type": "array", "minItems": 1, "description": "The values, one by one."}
    number: dict[str, Any] = {"type": "integer" if axis.is_whole else "number"}
    if "log" in axis.kind:
        number["exclusiveMinimum"] = 0
    count, words = (3, "Low, high and step.") if axis.is_stepped else (2, "Low and high.")
    return {"type": "array", "items": number, "minItems": count, "maxItems": count, "description": words}


def _searchable() -> list[str]:
    """Return the dotted fields that may be searched or tied."""
    found = []
    for section, field in SweepSpec.model_fields.items():
        for model in (field.annotation, *get_args(field.annotation)):
            names = model.model_fields if isinstance(model, type) and issubclass(model, Section) else ()
            found += [path for path in (f"{section}.{name}" for name in names) if _is_searchable(path)]
    return list(dict.fromkeys(found))


def _is_searchable(path: str) -> bool:
    try:
        check_searchable(path)
    except ValueError:
        return False
    return True
