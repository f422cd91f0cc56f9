"""Validation errors in a person's words."""

import difflib
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

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
        parts, model, members, inner = _walk(fault["loc"], root)
        path = ".".join(parts)
        if fault["type"] == "extra_forbidden":
            lines.append(_unknown_field(path, parts[-1], model, members))
            continue
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "model_type" and inner:
            message = f"must be a section of {', '.join(inner.model_fields)}"
        shown = "" if fault["type"] in ("value_error", "missing") else f" (got {fault['input']!r})"
        lines.append(f"{path}: {message}{shown}" if path else message)
    return list(dict.fromkeys(lines))


def _walk(
    location: tuple[int | str, ...], root: type[BaseModel] | None
) -> tuple[list[str], type[BaseModel] | None, _Members, type[BaseModel] | None]:
    """A fault's path as a person writes it, the section that holds its last part, what else could be there, and the
    section that the last part is.

    Where a field takes one of several sections, pydantic puts the kind into the path.
    """
    parts: list[str] = []
    model, members, field_model = root, _Members(), root
    field_members = _Members()
    for part in map(str, location):
        if part in field_members:
            field_model = field_members[part]
            continue
        if part.isdecimal():  # of a list of sections
            parts.append(part)
            continue
        model, members = field_model, field_members
        parts.append(part)
        field = model.model_fields.get(part) if model else None
        field_members = _members(field.annotation) if field else _Members()
        annotation = field.annotation if field else None
        annotation = next(iter(get_args(annotation)), annotation) if get_origin(annotation) is list else annotation
        field_model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return parts, model, members, field_model


def _members(annotation: Any) -> _Members:
    members = _Members()
    for member in get_args(annotation):
        if get_origin(member) is Annotated:
            model, *notes = get_args(member)
            members |= {note.tag: model for note in notes if isinstance(note, Tag)}
    return members


def _unknown_field(where: str, name: str, model: type[BaseModel] | None, members: _Members) -> str:
    if model is None:
        return f"{where}: unknown field"
    close = difflib.get_close_matches(name, model.model_fields, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    if kinds := [kind for kind, other in members.items() if name in other.model_fields]:
        hint = f"it belongs to kind {', '.join(kinds)}; "
    return f"{where}: unknown field; {hint}fields here: {', '.join(model.model_fields)}"
