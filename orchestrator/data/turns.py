"""Read conversations from rows into the form that chat templates take."""

import json
from dataclasses import dataclass
from typing import Any

from orchestrator.data.bad_rows import RowError
from orchestrator.data.row import Row, is_empty
from orchestrator.spec.sections import DataSection

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Names of speakers in ShareGPT's rows -> roles."""

MARKS = ("weight", "loss", "train")
"""Keys of a turn that say whether it is trained on: 0 or false, 1 or true."""


@dataclass(frozen=True)
class Turns:
    """A conversation, in the form that chat templates take."""

    turns: list[dict[str, Any]]
    marks: list[bool | None]
    """For each turn, whether it is marked as trained or as not trained; None without a mark."""
    tools: list[dict[str, Any]] | None
    """JSON schemas of the functions that the assistant can call."""


def read_turns(row: Row, data: DataSection) -> Turns:
    """Return the conversation in a row: its turns, with the columns `system` and `tools` if it has them.

    Turns are in the column `messages` or `conversations`. Rows of format messages may have them in `prompt` and
    `completion` instead (TRL's conversational form); `loss_on: assistant` then trains only turns of the completion.

    Raises:
        RowError: the row is not a conversation, or does not end with a turn of the assistant.
    """
    given, num_prompt = _given(row, data)
    turns, marks = [], []
    for each in given:
        turn = _turn(each, data, row.where)
        marks.append(_mark(turn, row.where))
        turns.append(turn)
    if data.loss_on == "assistant":
        marks[:num_prompt] = [bool(mark) for mark in marks[:num_prompt]]
    last = turns[-1]
    if last["role"] != "assistant" or not (last["content"].strip() or last.get("tool_calls")):
        raise RowError(row.where, "the last turn must be the assistant's and not empty")
    if len(turns) == 1:
        raise RowError(row.where, "the assistant's turn is the only one: no question comes before it")
    if num_prompt and data.loss_on == "completion" and len(turns) - num_prompt > 1:
        raise RowError(
            row.where,
            f"column completion has {len(turns) - num_prompt} turns, but loss_on completion trains only the last",
            "Set data.loss_on: assistant, which trains all assistant turns in it.",
            kind="column completion has several turns, but loss_on completion trains only the last",
        )
    if (system := _system(row, turns)) is not None:
        turns, marks = [system, *turns], [None, *marks]
    return Turns(turns, marks, _tools(row))


def in_two_columns(values: dict[str, Any]) -> bool:
    """Whether a row's turns are in `prompt` and `completion` (TRL's conversational form)."""
    return "messages" not in values and all(isinstance(values.get(name), list) for name in ("prompt", "completion"))


def _given(row: Row, data: DataSection) -> tuple[list[dict[str, Any]], int]:
    """Return a row's turns as they are written, and how many of them belong to TRL's prompt."""
    column = data.columns[0]
    if data.format == "messages" and in_two_columns(row.values):
        prompt = _listed(row, "prompt")
        return [*prompt, *_listed(row, "completion")], len(prompt)
    return _listed(row, column), 0


def _listed(row: Row, column: str) -> list[dict[str, Any]]:
    given = row.column(column)
    if not isinstance(given, list) or not given or not all(isinstance(turn, dict) for turn in given):
        kind = f"column {column} must be a list of turns"
        raise RowError(row.where, f"{kind}, got {given!r:.80}", kind=kind)
    return given


def _turn(given: dict[str, Any], data: DataSection, where: str) -> dict[str, Any]:
    """Return a turn with `role` and `content`. Its other keys are kept, since a chat template may read them."""
    turn = {name: value for name, value in given.items() if value is not None}
    needed = "a role and a content"
    if data.format == "sharegpt":
        needed = "a from and a value"
        for theirs, ours in (("from", "role"), ("value", "content")):
            if theirs in turn:
                turn[ours] = turn.pop(theirs)
    calls = turn.pop("tool_calls", None)
    if calls:
        turn = {"content": "", **turn}
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str | list):
        kind = f"each turn needs {needed}, both text"
        raise RowError(where, f"{kind}, got {given!r:.80}", kind=kind)
    turn |= {"role": _role(turn["role"], data, where), "content": _text(turn["content"], where)}
    if calls and turn["role"] != "assistant":
        kind = "only the assistant has tool_calls"
        raise RowError(where, f"{kind}, got {given!r:.80}", kind=kind)
    if calls:
        turn["tool_calls"] = [_call(call, where) for call in _list(calls, "tool_calls", where)]
    return turn


def roles_of(data: DataSection) -> dict[str, str]:
    """Return name of a speaker -> role. Format messages accepts other roles unchanged."""
    return {**(_ROLES if data.format == "sharegpt" else {}), **data.roles}


def _role(speaker: str, data: DataSection, where: str) -> str:
    known = roles_of(data)
    if data.format == "sharegpt" and speaker not in known:
        raise RowError(
            where,
            f"a turn is from {speaker!r}; known are {', '.join(known)}",
            f"Give that speaker a role: data.roles: {{{speaker}: assistant}}, or user, system, tool.",
            kind=f"a turn is from {speaker!r}, whose role is unknown",
        )
    return known.get(speaker, speaker)


def _text(content: str | list[Any], where: str) -> str:
    """Return a turn's content as text; the texts of a content in parts are joined, as templates do it."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            named = part.get("type") if isinstance(part, dict) else type(part).__name__
            kind = f"a turn's content has a part of type {named}"
            raise RowError(where, f"{kind}; only text is read", kind=kind)
        texts.append(text)
    return "".join(texts)


def _mark(turn: dict[str, Any], where: str) -> bool | None:
    """Remove the marks of a turn and return what they say; None without a mark.

    Raises:
        RowError: a mark says neither yes nor no, or two marks contradict each other.
    """
    given = {name: turn.pop(name) for name in MARKS if name in turn}
    for name, value in given.items():
        if value not in (0, 1):  # also matches false and true
            kind = f"{name} of a turn must be 0 or 1, or true or false"
            raise RowError(where, f"{kind}, got {value!r:.40}", kind=kind)
    said = {bool(value) for value in given.values()}
    if len(said) > 1:
        raise RowError(where, f"{' and '.join(given)} of a turn contradict each other")
    return said.pop() if said else None


def _system(row: Row, turns: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the turn that the column `system` adds at the beginning; None if there is none, or it is there already."""
    text = row.values.get("system")
    if is_empty(text):
        return None
    if not isinstance(text, str):
        raise RowError(row.where, f"column system must be text, got {type(text).__name__}")
    if turns[0]["role"] != "system":
        return {"role": "system", "content": text}
    if turns[0]["content"].strip() != text.strip():
        raise RowError(row.where, "column system and the system turn differ; remove one of the two")
    return None


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call with its arguments as an object: OpenAI writes them as JSON text, but templates expect objects."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        kind = "each of tool_calls needs a function with a name"
        raise RowError(where, f"{kind}, got {call!r:.80}", kind=kind)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise _wrong_arguments(where, f"the arguments of {function['name']} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise _wrong_arguments(where, f"the arguments of {function['name']} must be an object, got {arguments!r:.80}")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _wrong_arguments(where: str, fault: str) -> RowError:
    return RowError(where, fault, kind="the arguments of a call are not a JSON object")


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """Return the column `tools`: a list of JSON schemas, or the JSON text of one."""
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            kind = "column tools is not JSON"
            raise RowError(row.where, f"{kind}: {error}", kind=kind) from error
    return _list(tools, "tools", row.where) if tools else None


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        kind = f"{name} must be a list of objects"
        raise RowError(where, f"{kind}, got {value!r:.80}", kind=kind)
    return value
