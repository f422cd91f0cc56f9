"""Validation errors in a person's words."""

from typing import Annotated, Any, Literal, get_args, get_origin

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
    lines = []
    for fault in error.errors():
        parts, model, members = _walk(fault["loc"], root)
        path = ".".join(parts)
        if fault["type"] == "extra_forbidden":
            lines.append(_unknown_field(path, model, members, root))
            continue
        message = fault["msg"].removeprefix("Value error, ")
        shown = "" if fault["type"] in ("value_error", "missing") else f" (got {fault['input']!r})"
        lines.append(f"{path}: {message}{shown}" if path else message)
    return list(dict.fromkeys(lines))


def _walk(
    location: tuple[int | str, ...], root: type[BaseModel] | None
) -> tuple[list[str], type[BaseModel] | None, _Members]:
    """A fault's path as a person writes it, the section that holds its last part, and what else could be there.

    Where a field takes one of several sections, pydantic puts the kind into the path.
    """
    parts: list[str] = []
    model, members, field_model = root, _Members(), root
    field_members, kind_is_next = _Members(), False
    for part in map(str, location):
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
        field_model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return parts, model, members


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
            if get_origin(info.annotation) is Literal and name in get_args(info.annotation):
                return field
    return None
