"""From a row's columns to the prompt and the completion that the model reads."""

import string
from dataclasses import dataclass
from typing import Any

from orchestrator.data.files import Row
from orchestrator.data.turns import Conversation, read_turns
from orchestrator.errors import DataError
from orchestrator.spec.sections import DataSection
from orchestrator.spec.template import template_columns

# From Stanford Alpaca's `train.py` (Apache-2.0), which rows of this form are written for.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """Text in two parts; `prompt` is empty where the format knows none."""

    prompt: str
    completion: str
    answer: str
    """The completion without template, space and special tokens: what a generated answer is compared with."""
    answers: list[tuple[int, int]] | None = None
    """Where in the whole text each turn of the assistant stands, where more than the completion is learned."""


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
        case "alpaca":
            return _render_alpaca(row)
        case "messages" | "sharegpt":
            return _render_turns(row, data, tokenizer)
        case "template":
            return _render_template(row, data.template or "")


def render_prompt(text: str, data: DataSection, tokenizer: Any) -> str:
    """The prompt that asks `text`, written as the training rows were.

    A template with more than one prompt field cannot be filled from one text: it is then used as it stands.
    """
    if data.has_turns:
        turn = {"role": "user", "content": text}
        text = str(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
    elif data.format == "alpaca":
        text = _fill(_template_parts(_ALPACA), {"instruction": text})
    elif data.format == "template":
        head, _ = _at_last_column(data.template or "")
        columns = {name for _, name in head if name is not None}
        if len(columns) == 1:
            text = _fill(head, dict.fromkeys(columns, text))
    return text.rstrip()


_Parts = list[tuple[str, str | None]]
"""Literal text, each followed by a column or by nothing."""


def _template_parts(template: str) -> _Parts:
    return [(text, name) for text, name, _, _ in string.Formatter().parse(template)]


def _at_last_column(template: str) -> tuple[_Parts, _Parts]:
    """A template in two: up to its last column, and from there on."""
    parts = _template_parts(template)
    last = max(i for i, (_, name) in enumerate(parts) if name is not None)
    text, name = parts[last]
    return [*parts[:last], (text, None)], [("", name), *parts[last + 1 :]]


def _fill(parts: _Parts, values: dict[str, str]) -> str:
    return "".join(text + (values[name] if name is not None else "") for text, name in parts)


def _render_template(row: Row, template: str) -> Example:
    columns = template_columns(template)
    values = {name: _string(row, name) for name in columns}
    head, tail = _at_last_column(template)
    return _split(_fill(head, values), _fill(tail, values), values[columns[-1]])


def _render_alpaca(row: Row) -> Example:
    values = {name: _string(row, name) for name in ("instruction", "output")}
    template = _ALPACA
    if row.values.get("input") not in (None, ""):
        template, values["input"] = _ALPACA_WITH_INPUT, _string(row, "input")
    return _split(_fill(_template_parts(template), values), values["output"])


def _render_turns(row: Row, data: DataSection, tokenizer: Any) -> Example:
    if tokenizer.chat_template is None:
        raise DataError(
            f"data.format {data.format}: the tokenizer of the base has no chat template",
            "Give one in a file: data.chat_template; or use format template.",
        )
    conversation = Conversation(read_turns(row, data), row.where, tokenizer)
    whole, start = conversation.whole, conversation.prompt_end
    last = conversation.turns[-1]
    answer = last["content"].strip()
    if "tool_calls" in last:  # what the template makes of them, and of the content beside them
        ids = tokenizer(whole[start:], add_special_tokens=False)["input_ids"]
        answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    answers = conversation.answers() if data.loss_on == "assistant" else None
    return Example(whole[:start], whole[start:], answer, answers)


def _split(prompt: str, completion: str, answer: str | None = None) -> Example:
    kept = prompt.rstrip()
    return Example(kept, prompt[len(kept) :] + completion, (answer or completion).strip())


def _string(row: Row, column: str) -> str:
    value = row.column(column)
    if value is None or value != value or not str(value).strip():  # NaN: what is missing in a data frame
        raise DataError(f"{row.where}: column {column!r} is empty")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{row.where}: column {column!r} must be text, got {type(value).__name__}")
    return str(value)
