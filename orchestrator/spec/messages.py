"""Turn validation errors into messages for people."""

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from orchestrator.spec.sections.scheduler import FIELDS_OF_KIND
from orchestrator.spec.suggestions import suggested_field, suggested_value

_MOST_FAULTS = 50
_LONGEST_VALUE = 300
"""Characters of a value in a message."""

_Members = dict[str, type[BaseModel]]
"""Kind -> section, for a field that takes one of several sections."""


def describe(error: ValueError, root: type[BaseModel] | None = None) -> list[str]:
    """Return one line for each fault: the dotted field, the rule, the value.

    Args:
        error: raised by pydantic or by one of our validators.
        root: the model that was validated; lists the valid fields beside an unknown one.
    """
    if not isinstance(error, ValidationError):
        return [str(error)]
    rules_of: dict[tuple[str, str], list[str]] = {}  # (field, value) -> the rules of each type that the field takes
    faults = error.errors()
    for fault in faults[:_MOST_FAULTS]:
        if fault["type"] == "default_factory_not_called":  # it needs a section that has a fault of its own
            continue
        parts, model, members, inner = _walk(fault["loc"], root)
        path = ".".join(parts)
        if fault["type"] == "extra_forbidden":
            rules_of[_unknown_field(path, model, members, root), ""] = []
            continue
        shown = "" if fault["type"] in ("value_error", "missing") else f" (got {_shortened(repr(fault['input']))})"
        shown += _value_meant(fault)
        rule = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "model_type" and inner:
            rule = f"must be a section of {', '.join(inner.model_fields)}"
        rules_of.setdefault((path, shown), []).append(rule)
    more = [f"and {len(faults) - _MOST_FAULTS} more faults"] if len(faults) > _MOST_FAULTS else []
    return [
        *(": ".join(filter(None, [path, " or ".join(rules) + shown])) for (path, shown), rules in rules_of.items()),
        *more,
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."


def _value_meant(fault: Any) -> str:
    """Return a question such as `; did you mean cosine?` for a value that is not one of the field's; else nothing."""
    values, written = re.findall(r"'([^']*)'", str(fault.get("ctx", {}).get("expected", ""))), fault["input"]
    if fault["type"] == "scheduler_kind":
        values, written = [*FIELDS_OF_KIND], written.get("kind") if isinstance(written, dict) else None
    elif fault["type"] != "literal_error":
        return ""
    found = suggested_value(written, values)
    return f"; did you mean {found}?" if found else ""


def _walk(
    location: tuple[int | str, ...], root: type[BaseModel] | None
) -> tuple[list[str], type[BaseModel] | None, _Members, type[BaseModel] | None]:
    """Follow the location of a fault through the models.

    pydantic puts the kind into the location of a field that takes one of several sections, and the type into that of
    a field that takes one of several types. Both are left out of the path.

    Returns:
        The path as a person writes it; the section that holds the last part; the other sections that could be there
        (by kind); the section that the last part is, if it is one.
    """
    parts: list[str] = []
    model, members, field_model = root, _Members(), root
    field_members, kind_is_next, type_is_next = _Members(), False, False
    for part in map(str, location):
        if type_is_next:
            type_is_next = False
            continue
        if kind_is_next and part in field_members:
            field_model, kind_is_next = field_members[part], False
            continue
        if part.isdecimal():  # index into a list of sections
            parts.append(part)
            continue
        model, members = field_model, field_members
        parts.append(part)
        field = model.model_fields.get(part) if model else None
        field_members = _members(field.annotation) if field else _Members()
        kind_is_next = bool(field_members)
        annotation = field.annotation if field else None
        annotation = next(iter(get_args(annotation)), annotation) if get_origin(annotation) is list else annotation
        type_is_next = not field_members and len(types_of(annotation)) > 1
        field_model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return parts, model, members, field_model


def types_of(annotation: Any) -> set[Any]:
    """Return the types that a field takes, without None and without bounds; a union gives all its members."""
    members = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return types_of(members[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(types_of, members)) - {NoneType}
    return {annotation}


def _members(annotation: Any) -> _Members:
    members = _Members()
    for member in get_args(annotation):
        if get_origin(member) is Annotated:
            model, *notes = get_args(member)
            members |= {note.tag: model for note in notes if isinstance(note, Tag)}
    return members


def _unknown_field(where: str, model: type[BaseModel] | None, members: _Members, root: type[BaseModel] | None) -> str:
    if model is None or root is None:
        return f"{where}: unknown field"
    section, _, name = where.rpartition(".")
    if field := _field_of_value(name, model, members):
        hint = f"{name} is a value: write {section}: {{{field}: {name}, ...}}; "
    elif kinds := [kind for kind, other in members.items() if name in other.model_fields]:
        hint = f"it belongs to kind {', '.join(kinds)}; "
    elif found := suggested_field(where, model, root):
        hint = f"did you mean {found}? "
    else:
        hint = ""
    return f"{where}: unknown field; {hint}fields here: {', '.join(model.model_fields)}"


def _field_of_value(name: str, model: type[BaseModel], members: _Members) -> str | None:
    """Return the field of which `name` is one of the literal values; None if there is none."""
    for each in (model, *members.values()):
        for field, info in each.model_fields.items():
            if any(get_origin(kind) is Literal and name in get_args(kind) for kind in types_of(info.annotation)):
                return field
    return None
