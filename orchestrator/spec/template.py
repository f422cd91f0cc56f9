"""Templates of rows: which are well-formed, before any row is read."""

import re
import string
from functools import cache

_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Around what a chat template lets the assistant say: transformers' own tags."""


def template_columns(template: str) -> list[str]:
    """Columns that a template reads, in order.

    Raises:
        ValueError: the template is malformed, or has no column.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"data.template {template!r}: {error}; a literal brace is written twice: {{{{ or }}}}"
        ) from None
    columns = [name for _, name, _, _ in parts if name is not None]
    plain = all(not form and not conversion for _, _, form, conversion in parts)
    if not columns or not plain or any(not name.isidentifier() for name in columns):
        raise ValueError(f"data.template {template!r}: needs {{column}} fields with plain names, got {columns}")
    return columns


def is_chat_template(text: str) -> bool:
    """Whether this is a chat template's text, and not the name of its file."""
    return "{%" in text or "{{" in text


def marks_answers(template: str) -> bool:
    """Whether a chat template says itself what the assistant's part is (`{% generation %}`)."""
    return _MARKS.search(template) is not None


@cache
def check_chat_template(template: str) -> None:
    """Look at a chat template's syntax.

    Raises:
        ValueError: it is none.
    """
    from jinja2 import Environment, TemplateSyntaxError

    if not is_chat_template(template):
        raise ValueError(f"chat_template {template!r:.80}: is no Jinja template, and no file was read")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", template))
    except TemplateSyntaxError as error:
        raise ValueError(f"chat_template: line {error.lineno}: {error.message}") from error
