"""Templates of rows: parse and check them before any row is read."""

import re
from dataclasses import dataclass
from functools import cache

_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Tags that mark the assistant's text in a chat template (`{% generation %}`, defined by transformers)."""

# The tag of a block that is alone on its line takes the line break with it.
_FIELD = re.compile(r"\{\{|\}\}|(?:(?<=\n)|^)\{([?/][^{}\n]*)\}\n|\{([^{}\n]*)\}|[{}]")


@dataclass(frozen=True)
class Field:
    """A column that a template reads."""

    column: str
    is_optional: bool
    """Whether the column may be empty, written `{column?}`."""


@dataclass(frozen=True)
class Block:
    """A part of a template that is written only if a column is not empty: `{?column}...{/column}`."""

    column: str
    parts: tuple["str | Field | Block", ...]


Parts = tuple[str | Field | Block, ...]
"""Literal text, fields and blocks, in their order."""


@cache
def parse_template(template: str) -> Parts:
    """Parse a template. The last field at the outermost level is the completion.

    `{column}` is a field, `{column?}` a field that may be empty. `{?column}...{/column}` is left out if the column is
    empty. Write a literal brace twice, and also a question mark that ends a column's name.

    Raises:
        ValueError: the template is malformed, has no field, or its completion may be missing.
    """
    fault = f"data.template {template!r}: "
    stack: list[tuple[str, list[str | Field | Block]]] = [("", [])]
    at = 0
    for match in _FIELD.finditer(template):
        stack[-1][1].append(template[at : match.start()])
        at = match.end()
        text = match[0]
        if text in ("{{", "}}"):
            stack[-1][1].append(text[0])
            continue
        name = match[1] if match[1] is not None else match[2]
        if name is None:
            raise ValueError(
                f"{fault}a single {text!r} at character {match.start() + 1}; a literal brace is written "
                "twice: {{ or }}"
            )
        if name.startswith("?"):
            stack.append((_named(name[1:], fault), []))
        elif name.startswith("/"):
            opened, parts = stack[-1]
            if len(stack) == 1 or opened != name[1:]:
                raise ValueError(f"{fault}{{{name}}} ends no block; the innermost open one: {opened or 'none'}")
            stack.pop()
            stack[-1][1].append(Block(opened, tuple(parts)))
        else:
            stack[-1][1].append(_field(name, fault))
    if len(stack) > 1:
        raise ValueError(f"{fault}{{?{stack[-1][0]}}} has no end; write {{/{stack[-1][0]}}} after its text")
    parts = [*stack[0][1], template[at:]]
    return _checked(tuple(part for part in parts if part != ""), fault)


def template_columns(template: str) -> list[str]:
    """Return the columns that a template reads and that every row must have, in order.

    Raises:
        ValueError: the template is malformed.
    """
    return [field.column for field in _fields(parse_template(template)) if not field.is_optional]


def optional_columns(template: str) -> set[str]:
    """Return the columns that a template reads and that may be empty, or missing from a row.

    Raises:
        ValueError: the template is malformed.
    """
    return {field.column for field in _fields(parse_template(template)) if field.is_optional}


def written_column(column: str) -> str | None:
    """Return the field that reads a column; None if the column's name cannot be written in a template."""
    if not column or column.startswith(("?", "/")) or re.search(r"[{}\n]", column):
        return None
    name = column.rstrip("?")
    return f"{{{name}{'?' * 2 * (len(column) - len(name))}}}"


def _field(name: str, fault: str) -> Field:
    bare = name.rstrip("?")
    num_marks = len(name) - len(bare)
    return Field(_named(bare + "?" * (num_marks // 2), fault), is_optional=num_marks % 2 == 1)


def _named(column: str, fault: str) -> str:
    if not column:
        raise ValueError(f"{fault}a field has no name; write {{column}} fields")
    return column


def _checked(parts: Parts, fault: str) -> Parts:
    """Refuse a template without fields, or one whose completion may be missing."""
    fields = _fields(parts)
    if not fields:
        raise ValueError(f"{fault}has no field; write {{column}} fields")
    outer = [part for part in parts if isinstance(part, Field | Block)]
    last = outer[-1]
    if isinstance(last, Block) or last.is_optional:
        raise ValueError(f"{fault}{last.column} comes last, so it is the completion, which must not be optional")
    return parts


def _fields(parts: Parts) -> list[Field]:
    """Return all fields. A field inside a block on the same column is optional, since the column may be empty."""
    found: list[Field] = []
    for part in parts:
        if isinstance(part, Block):
            found.append(Field(part.column, is_optional=True))
            found += [
                Field(field.column, field.is_optional or field.column == part.column) for field in _fields(part.parts)
            ]
        elif isinstance(part, Field):
            found.append(part)
    return found


def is_chat_template(text: str) -> bool:
    """Whether a text is a chat template, not the name of a file."""
    return "{%" in text or "{{" in text


def marks_answers(template: str) -> bool:
    """Whether a chat template marks the assistant's text (`{% generation %}`)."""
    return _MARKS.search(template) is not None


@cache
def lacks_stop_token(template: str, loss_on: str) -> bool:
    """Whether a chat template certainly writes nothing but space in the loss after an answer.

    Found out by rendering one question and its answer. If the template refuses them, or leaves the answer out, nothing
    is certain and the result is False.

    Args:
        template: text of the template.
        loss_on: `data.loss_on`. With `assistant`, the template's `{% generation %}` tags say what is in the loss.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    # Rendered as in transformers (5.23, `utils/chat_template_utils.py`), with placeholders for special tokens.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    close = "\x02"
    marked = _MARKS.sub(lambda tag: f"{{{{ '{close}' }}}}" if tag[1] else "", template)
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        whole = environment.from_string(marked).render(
            messages=turns, tools=None, add_generation_prompt=False, bos_token="<bos>", eos_token="<eos>"
        )
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ):  # errors of the template are reported when its rows are rendered
        return False
    _, found, rest = whole.rpartition(_PROBE)
    if loss_on == "assistant":
        rest = rest.partition(close)[0]
    return bool(found) and not rest.replace(close, "").strip()


_PROBE = "an answer to look for"


@cache
def check_chat_template(template: str) -> None:
    """Check the syntax of a chat template.

    Raises:
        ValueError: it is not a Jinja template.
    """
    from jinja2 import Environment, TemplateSyntaxError

    if not is_chat_template(template):
        raise ValueError(f"chat_template {template!r:.80}: is not a Jinja template; give the file of one")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", template))
    except TemplateSyntaxError as error:
        raise ValueError(f"chat_template: line {error.lineno}: {error.message}") from error
