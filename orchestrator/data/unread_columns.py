"""Find columns, and keys of turns, that nothing reads."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from orchestrator.data.bad_rows import RowError
from orchestrator.data.conversation import Conversation, names
from orchestrator.data.row import Row, is_empty
from orchestrator.data.turns import MARKS, in_two_columns, read_turns, roles_of
from orchestrator.spec.sections import DataSection

_KEYS_OF_TURNS = {"role", "content", "tool_calls", "from", "value"}


def find_unread(rows: Sequence[Row], data: DataSection, tokenizer: Any) -> dict[str, int]:
    """Find columns, and keys of turns, that neither the format nor a template reads, in the order of their first row.

    Args:
        rows: all rows that are used.
        data: the section.
        tokenizer: its chat template renders conversations.

    Returns:
        Name -> number of rows in which it is not empty; a turn's key is named `messages[].key`.
    """
    found: Counter[str] = Counter()
    for row in rows:
        columns = _columns(row, data)
        found.update(name for name, value in row.values.items() if name not in columns and not is_empty(value))
    if not data.has_turns:
        return dict(found)
    first: dict[str, Row] = {}
    for row in rows:
        for name, key in _keys(row, data):
            found[name] += 1
            first.setdefault(key, row)
    is_read = {key: key not in MARKS and _is_read(key, row, data, tokenizer) for key, row in first.items()}
    return {name: number for name, number in found.items() if not is_read.get(name.rpartition("[].")[2], False)}


def _columns(row: Row, data: DataSection) -> set[str]:
    """Return the columns of a row that its format reads."""
    if data.has_turns:
        in_two = data.format == "messages" and in_two_columns(row.values)
        return {"tools", "system", *(("prompt", "completion") if in_two else data.columns)}
    return {*data.columns, *data.optional_columns, *(["input"] if data.format == "alpaca" else [])}


def _keys(row: Row, data: DataSection) -> dict[tuple[str, str], None]:
    """Return the keys of a row's turns that not every turn has, each as (`column[].key`, `key`).

    A key that says whether a turn is trained on is read, unless it asks to train a turn that `loss_on` never trains.
    """
    found: dict[tuple[str, str], None] = {}
    for column in sorted(_columns(row, data) - {"tools", "system"}):
        turns = row.values.get(column)
        for turn in turns if isinstance(turns, list) else []:
            for key, value in turn.items() if isinstance(turn, dict) else ():
                if key in MARKS:
                    speaker = turn.get("role", turn.get("from"))
                    if value and data.loss_on != "all" and roles_of(data).get(speaker, speaker) != "assistant":
                        found[f"{column}[].{key}", key] = None
                elif key not in _KEYS_OF_TURNS and not is_empty(value):
                    found[f"{column}[].{key}", key] = None
    return found


def _is_read(key: str, row: Row, data: DataSection, tokenizer: Any) -> bool:
    """Whether the chat template reads a key of turns, judged by the first row that has the key."""
    try:
        return Conversation(read_turns(row, data), row.where, tokenizer).reads(key)
    except RowError:  # reported as a bad row
        return names(tokenizer.chat_template, key)
