"""Validation errors in a person's words."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from orchestrator.spec.names import meant

_Members = dict[str, type[BaseModel]]
"""Kind -> section, of a field that takes one of several sections."""


def describe(error: ValueError, root: type[BaseModel] | None = None) -> list[str]:
    """One line a fault: the dotted field, the rule, the value.

    Args:
        error: what pydantic or one of our validators raised.
        root: the model that was validated, to list the fields beside an unknown one.
    """
    if not isinstance(error, ValidationError):
        return [str(error)]
    told: dict[tuple[str, str], list[str]] = {}  # field and value -> what each of the field's types says
    for fault in error.errors():
        parts, model, members, inner = _walk(fault["loc"], root)
        path = ".".join(parts)
        if fault["type"] == "extra_forbidden":
            told[_unknown_field(path, model, members, root), ""] = []
            continue
        shown = "" if fault["type"] in ("value_error", "missing") else f" (got {fault['input']!r})"
        rule = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "model_type" and inner:
            rule = f"must be a section of {', '.join(inner.model_fields)}"
        told.setdefault((path, shown), []).append(rule)
    return [": ".join(filter(None, [path, " or ".join(rules) + shown])) for (path, shown), rules in told.items()]


def _walk(
    location: tuple[int | str, ...], root: type[BaseModel] | None
) -> tuple[list[str], type[BaseModel] | None, _Members, type[BaseModel] | None]:
    """A fault's path as a person writes it, the section that holds its last part, what else could be there, and the
    section that the last part is.

    Where a field takes one of several sections, pydantic puts the kind into the path; where it takes one of several
    types, the type.
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
        if part.isdecimal():  # of a list of sections
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
    """The types that a field takes beside nothing: the members of a union, without the bounds in them."""
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
    elif found := meant(where, model, root):
        hint = f"did you mean {found}? "
    else:
        hint = ""
    return f"{where}: unknown field; {hint}fields here: {', '.join(model.model_fields)}"


def _field_of_value(name: str, model: type[BaseModel], members: _Members) -> str | None:
    """The field of a section that has one of a few names as its value, this among them."""
    for each in (model, *members.values()):
        for field, info in each.model_fields.items():
            if any(get_origin(kind) is Literal and name in get_args(kind) for kind in types_of(info.annotation)):
                return field
    return None
