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
def writes_no_end(template: str, loss_on: str) -> bool:
    """Whether a chat template surely has nothing but space in the loss behind an answer.

    It writes one question and its answer to find out. Where it refuses these or leaves the answer out, nothing is
    sure.

    Args:
        template: text of the template.
        loss_on: `data.loss_on`; of `assistant` the template's `{% generation %}` marks say what is in the loss.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    # As transformers renders (5.23, `utils/chat_template_utils.py`), with signs for what the tokenizer knows.
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
    except (TemplateError, TypeError, ValueError):  # what is wrong with it is told where its rows are written
        return False
    _, found, rest = whole.rpartition(_PROBE)
    if loss_on == "assistant":
        rest = rest.partition(close)[0]
    return bool(found) and not rest.replace(close, "").strip()


_PROBE = "an answer to look for"


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
