"""From a row's columns to the prompt and the completion that the model reads."""

import string
from dataclasses import dataclass
from typing import Any

from orchestrator.data.sources import Row
from orchestrator.errors import DataError
from orchestrator.spec.sections import DataSection


@dataclass(frozen=True)
class Example:
    """Text in two parts; `prompt` is empty where the format knows none."""

    prompt: str
    completion: str
    answer: str
    """The completion without template, space and special tokens: what a generated answer is compared with."""


def render(row: Row, data: DataSection, tokenizer: Any) -> Example:
    """Prompt and completion of a row. Space between the two belongs to the completion, so that a prompt alone
    has the same tokens as a prompt with its completion.

    Raises:
        DataError: a column is missing, of the wrong type, or empty; the message names file and line.
    """
    match data.format:
        case "text":
            text = _string(row, "text")
            return Example("", text, text.strip())
        case "prompt":
            return _split(_string(row, "prompt"), _string(row, "completion"))
        case "messages":
            return _render_messages(row, tokenizer)
        case "template":
            return _render_template(row, data.template or "")


def render_prompt(text: str, data: DataSection, tokenizer: Any) -> str:
    """The prompt that asks `text`, written as the training rows were.

    A template with more than one prompt field cannot be filled from one text: it is then used as it stands.
    """
    if data.format == "messages":
        turn = {"role": "user", "content": text}
        text = str(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
    elif data.format == "template":
        head, _ = _template_parts(data.template or "")
        columns = {name for _, name in head if name is not None}
        if len(columns) == 1:
            text = _fill(head, dict.fromkeys(columns, text))
    return text.rstrip()


def template_columns(template: str) -> list[str]:
    """Columns that a template reads, in order.

    Raises:
        DataError: the template is malformed, or has no column.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"data.template {template!r}: {error}", "Write a literal brace twice: {{ or }}.") from error
    columns = [name for _, name, _, _ in parts if name is not None]
    plain = all(not form and not conversion for _, _, form, conversion in parts)
    if not columns or not plain or any(not name.isidentifier() for name in columns):
        raise DataError(f"data.template {template!r}: needs {{column}} fields with plain names, got {columns}")
    return columns


_Parts = list[tuple[str, str | None]]
"""Literal text, each followed by a column or by nothing."""


def _template_parts(template: str) -> tuple[_Parts, _Parts]:
    """A template in two: up to its last column, and from there on."""
    parts: _Parts = [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
    last = max(i for i, (_, name) in enumerate(parts) if name is not None)
    text, name = parts[last]
    return [*parts[:last], (text, None)], [("", name), *parts[last + 1 :]]


def _fill(parts: _Parts, values: dict[str, str]) -> str:
    return "".join(text + (values[name] if name is not None else "") for text, name in parts)


def _render_template(row: Row, template: str) -> Example:
    columns = template_columns(template)
    values = {name: _string(row, name) for name in columns}
    head, tail = _template_parts(template)
    return _split(_fill(head, values), _fill(tail, values), values[columns[-1]])


def _render_messages(row: Row, tokenizer: Any) -> Example:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise DataError(f"{row.where}: column messages must be a list of turns, got {messages!r:.80}")
    for turn in messages:
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise DataError(f"{row.where}: each turn needs a role and a content, got {turn!r:.80}")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(f"{row.where}: the last turn must be the assistant's and not empty")
    if tokenizer.chat_template is None:
        raise DataError("data.format messages: the tokenizer of the base has no chat template", "Use format template.")
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)).rstrip()
    if not whole.startswith(prompt):
        raise DataError(f"{row.where}: the chat template renders the prompt alone otherwise than with its answer")
    return Example(prompt, whole[len(prompt) :], messages[-1]["content"].strip())


def _split(prompt: str, completion: str, answer: str | None = None) -> Example:
    kept = prompt.rstrip()
    return Example(kept, prompt[len(kept) :] + completion, (answer or completion).strip())


def _string(row: Row, column: str) -> str:
    if column not in row.values:
        raise DataError(f"{row.where}: there is no column {column!r}; columns: {', '.join(row.values)}")
    value = row.values[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{row.where}: column {column!r} must be text, got {type(value).__name__}")
    if not str(value).strip():
        raise DataError(f"{row.where}: column {column!r} is empty")
    return str(value)
