"""Validation errors in a person's words."""

import difflib
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError


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
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(_unknown_field(fault["loc"], root))
            continue
        message = fault["msg"].removeprefix("Value error, ")
        shown = "" if fault["type"] in ("value_error", "missing") else f" (got {fault['input']!r})"
        lines.append(f"{path}: {message}{shown}" if path else message)
    return list(dict.fromkeys(lines))


def _unknown_field(location: tuple[int | str, ...], root: type[BaseModel] | None) -> str:
    *parents, name = (str(part) for part in location)
    model: type[BaseModel] | None = root
    for parent in parents:
        if parent.isdecimal():  # of a list of sections
            continue
        field = model.model_fields.get(parent) if model else None
        annotation = field.annotation if field else None
        annotation = next(iter(get_args(annotation)), annotation) if get_origin(annotation) is list else annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    where = ".".join([*parents, name])
    if model is None:
        return f"{where}: unknown field"
    close = difflib.get_close_matches(name, model.model_fields, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{where}: unknown field; {hint}fields here: {', '.join(model.model_fields)}"
