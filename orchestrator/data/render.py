"""Render rows: from a row's columns to the prompt and the completion that the model reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from orchestrator.data.bad_rows import RowError
from orchestrator.data.conversation import Conversation, Span
from orchestrator.data.row import Row, is_empty
from orchestrator.data.turns import read_turns
from orchestrator.errors import DataError
from orchestrator.spec.sections import DataSection
from orchestrator.spec.template import Block, Field, Parts, parse_template

# From Stanford Alpaca's `train.py` (Apache-2.0): rows with these columns are written for these texts.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)

_UNSUPPORTED_COLUMNS = ("system", "history", "tools")
"""Columns with instructions for the model that formats without turns cannot render."""


@dataclass(frozen=True)
class Example:
    """A row's text in two parts; `prompt` is empty if the format has none."""

    prompt: str
    completion: str
    answer: str
    """The completion without template text, space and special tokens; generated answers are compared with it."""
    trained_spans: list[Span] | None = None
    """Parts of the whole text that are in the loss; None if data.loss_on alone says them: all, or the completion."""


def render(row: Row, data: DataSection, tokenizer: Any) -> Example:
    """Render a row. Space between prompt and completion belongs to the completion, so that a prompt has the same tokens
    with its completion and without.

    Raises:
        RowError: a column is missing, empty or of the wrong type, or the format cannot render it.
        DataError: no row can be rendered, because the tokenizer has no chat template.
    """
    match data.format:
        case "text":
            text = _string(row, "text")
            return Example("", text, text.strip())
        case "prompt":
            _refuse_columns(row, _UNSUPPORTED_COLUMNS, data)
            return _render_prompt(row)
        case "alpaca":
            _refuse_columns(row, _UNSUPPORTED_COLUMNS, data)
            has_input = not is_empty(row.values.get("input"))
            return _render_template(row, _ALPACA_WITH_INPUT if has_input else _ALPACA)
        case "messages" | "sharegpt":
            _refuse_columns(row, ("history",), data)
            return _render_turns(row, data, tokenizer)
        case "template":
            return _render_template(row, data.template or "", "Write {column?} for a column that may be empty.")


def render_prompt(text: str, data: DataSection, tokenizer: Any) -> str:
    """Render the prompt that asks `text`, as the training rows were rendered.

    A template whose prompt has several columns that must not be empty cannot be filled from one text: `text` is then
    used unchanged.
    """
    match data.format:
        case "messages" | "sharegpt":
            turn = {"role": "user", "content": text}
            text = str(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
        case "alpaca" | "template":
            head, _ = _at_completion(parse_template(data.template or _ALPACA))
            columns = {part.column for part in head if isinstance(part, Field) and not part.is_optional}
            if len(columns) == 1:
                text = _fill(head, dict.fromkeys(columns, text))
        case "text" | "prompt":
            pass
        case unknown:
            assert_never(unknown)
    return text.rstrip()


def _at_completion(parts: Parts) -> tuple[Parts, Parts]:
    """Split a template in two: before the last field, which is the completion, and from it on."""
    last = max(i for i, part in enumerate(parts) if isinstance(part, Field))
    return parts[:last], parts[last:]


def _fill(parts: Parts, values: Mapping[str, str]) -> str:
    """Return a template's text. A column without a value is left out, with the blocks that depend on it."""
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
    """Fill a template with a row's columns; `if_empty` is the remedy for an empty column before the completion."""
    head, tail = _at_completion(parse_template(template))
    completion = tail[0]
    assert isinstance(completion, Field)
    values = {**_values(row, head, if_empty), **_values(row, tail)}
    return _split(_fill(head, values), _fill(tail, values), values[completion.column])


def _values(row: Row, parts: Parts, if_empty: str = "") -> dict[str, str]:
    """Return the texts of the columns that these parts need in this row; empty optional columns are left out."""
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
                f"column {column!r} is a list of turns, but format prompt reads text",
                "Set data.format: messages, which reads prompt and completion as turns.",
            )
    return _split(_string(row, "prompt"), _string(row, "completion"))


def _refuse_columns(row: Row, columns: tuple[str, ...], data: DataSection) -> None:
    """Refuse a row that has content in a column which its format cannot render."""
    for column in columns:
        if not is_empty(row.values.get(column)):
            raise RowError(
                row.where,
                f"column {column!r} is not empty, but format {data.format} cannot render it",
                "Write such rows as conversations (format messages), name the column in a template (format template), "
                "or remove it from the rows.",
            )


def _render_turns(row: Row, data: DataSection, tokenizer: Any) -> Example:
    if tokenizer.chat_template is None:
        raise DataError(
            f"data.format {data.format}: the tokenizer of the base has no chat template",
            "Give one in a file (data.chat_template), or use format template.",
        )
    conversation = Conversation(read_turns(row, data), row.where, tokenizer)
    whole, start = conversation.whole, conversation.prompt_end
    last = conversation.turns[-1]
    answer = last["content"].strip()
    if "tool_calls" in last:  # the answer is what the template makes of the calls and the content beside them
        ids = tokenizer(whole[start:], add_special_tokens=False)["input_ids"]
        answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Example(whole[:start], whole[start:], answer, conversation.trained_spans(data.loss_on))


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
