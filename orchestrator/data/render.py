"""From a row's columns to the prompt and the completion that the model reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.data.bad_rows import RowError
from orchestrator.data.conversation import Conversation, Span
from orchestrator.data.row import Row, is_empty
from orchestrator.data.turns import read_turns
from orchestrator.errors import DataError
from orchestrator.spec.sections import DataSection
from orchestrator.spec.template import Block, Field, Parts, parse_template

# From Stanford Alpaca's `train.py` (Apache-2.0), which rows of this form are written for.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)

_NO_PLACE = ("system", "history", "tools")
"""Columns that say something to the model, and that formats without turns have no place for."""


@dataclass(frozen=True)
class Example:
    """Text in two parts; `prompt` is empty where the format knows none."""

    prompt: str
    completion: str
    answer: str
    """The completion without template, space and special tokens: what a generated answer is compared with."""
    learned: list[Span] | None = None
    """Parts of the whole text that are in the loss; None where data.loss_on tells them: all, or the completion."""


def render(row: Row, data: DataSection, tokenizer: Any) -> Example:
    """Prompt and completion of a row. Space between the two belongs to the completion, so that a prompt alone
    has the same tokens as a prompt with its completion.

    Raises:
        RowError: a column is missing, of the wrong type, or empty, or says what the format has no place for.
        DataError: no row can be written: the tokenizer has no chat template.
    """
    match data.format:
        case "text":
            text = _string(row, "text")
            return Example("", text, text.strip())
        case "prompt":
            _require_placed(row, _NO_PLACE, data)
            return _render_prompt(row)
        case "alpaca":
            _require_placed(row, _NO_PLACE, data)
            has_input = not is_empty(row.values.get("input"))
            return _render_template(row, _ALPACA_WITH_INPUT if has_input else _ALPACA)
        case "messages" | "sharegpt":
            _require_placed(row, ("history",), data)
            return _render_turns(row, data, tokenizer)
        case "template":
            return _render_template(row, data.template or "", "A column that may be empty is marked so: {column?}.")


def render_prompt(text: str, data: DataSection, tokenizer: Any) -> str:
    """The prompt that asks `text`, written as the training rows were.

    A template with more than one column in its prompt, beside those that may be empty, cannot be filled from one
    text: the text is then used as it stands.
    """
    if data.has_turns:
        turn = {"role": "user", "content": text}
        text = str(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
    elif data.format in ("alpaca", "template"):
        head, _ = _at_completion(parse_template(data.template or _ALPACA))
        columns = {part.column for part in head if isinstance(part, Field) and not part.is_optional}
        if len(columns) == 1:
            text = _fill(head, dict.fromkeys(columns, text))
    return text.rstrip()


def _at_completion(parts: Parts) -> tuple[Parts, Parts]:
    """A template in two: up to the last column, which is the completion, and from there on."""
    last = max(i for i, part in enumerate(parts) if isinstance(part, Field))
    return parts[:last], parts[last:]


def _fill(parts: Parts, values: Mapping[str, str]) -> str:
    """A template's text; a column that has no value is left out, with the blocks that stand on it."""
    text = []
    for part in parts:
        match part:
            case str():
                text.append(part)
            case Field():
                text.append(values.get(part.column, ""))
            case Block():
                text.append(_fill(part.parts, values) if values.get(part.column) else "")
    return "".join(text)


def _render_template(row: Row, template: str, if_empty: str = "") -> Example:
    """A template filled with a row's columns; `if_empty` is the remedy for an empty one before the completion."""
    head, tail = _at_completion(parse_template(template))
    completion = tail[0]
    assert isinstance(completion, Field)
    values = {**_values(row, head, if_empty), **_values(row, tail)}
    return _split(_fill(head, values), _fill(tail, values), values[completion.column])


def _values(row: Row, parts: Parts, if_empty: str = "") -> dict[str, str]:
    """Texts of the columns that these parts need in this row: an optional one that is empty has none."""
    values: dict[str, str] = {}
    for part in parts:
        if isinstance(part, str):
            continue
        has_value = not is_empty(row.values.get(part.column))
        if has_value or (isinstance(part, Field) and not part.is_optional):
            values[part.column] = _string(row, part.column, if_empty)
        if has_value and isinstance(part, Block):
            values |= _values(row, part.parts, if_empty)
    return values


def _render_prompt(row: Row) -> Example:
    for column in ("prompt", "completion"):
        if isinstance(row.column(column), list):
            raise RowError(
                row.where,
                f"column {column!r} is a list of turns, and format prompt reads text",
                "Set data.format: messages, which reads prompt and completion as turns.",
            )
    return _split(_string(row, "prompt"), _string(row, "completion"))


def _require_placed(row: Row, columns: tuple[str, ...], data: DataSection) -> None:
    """Refuse a row with something to say in a column that its format has no place for."""
    for column in columns:
        if not is_empty(row.values.get(column)):
            raise RowError(
                row.where,
                f"column {column!r} is not empty, and format {data.format} has no place for it",
                "Write such rows as conversations (format messages), or name the column in a template "
                "(format template); or take it out of the rows.",
            )


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
    return Example(whole[:start], whole[start:], answer, conversation.learned(data.loss_on))


def _split(prompt: str, completion: str, answer: str | None = None) -> Example:
    kept = prompt.rstrip()
    return Example(kept, prompt[len(kept) :] + completion, (answer or completion).strip())


def _string(row: Row, column: str, if_empty: str = "") -> str:
    value = row.column(column)
    if is_empty(value):
        raise RowError(row.where, f"column {column!r} is empty", if_empty)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(row.where, f"column {column!r} must be text, got {type(value).__name__}")
    return str(value)
