"""Conversations: turns with their tools, as a chat template writes them."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from orchestrator.data.files import Row
from orchestrator.errors import DataError
from orchestrator.spec.sections import DataSection
from orchestrator.spec.template import marks_answers

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names of who speaks."""


@dataclass(frozen=True)
class Turns:
    """A conversation, in the form that chat templates take."""

    turns: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    """JSON schemas of what the assistant can call."""


def read_turns(row: Row, data: DataSection) -> Turns:
    """The conversation in a row's column `messages` or `conversations`, and its column `tools` where there is one.

    Raises:
        DataError: it is none, or does not end with the assistant's turn; the message names file and line.
    """
    column = data.columns[0]
    given = row.column(column)
    if not isinstance(given, list) or not given or not all(isinstance(turn, dict) for turn in given):
        raise DataError(f"{row.where}: column {column} must be a list of turns, got {given!r:.80}")
    read = _of_sharegpt if data.format == "sharegpt" else _of_messages
    turns = [read(turn, row.where) for turn in given]
    last = turns[-1]
    if last["role"] != "assistant" or not (last["content"].strip() or last.get("tool_calls")):
        raise DataError(f"{row.where}: the last turn must be the assistant's and not empty")
    if len(turns) == 1:
        raise DataError(f"{row.where}: the assistant's turn stands alone: nothing asks for it")
    return Turns(turns, _tools(row))


def _of_sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or not isinstance(value, str):
        raise DataError(f"{where}: each turn needs a from and a value, both text, got {turn!r:.80}")
    if speaker not in _ROLES:
        raise DataError(f"{where}: a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[speaker], "content": value}


def _of_messages(turn: dict[str, Any], where: str) -> dict[str, Any]:
    turn = {name: value for name, value in turn.items() if value is not None}
    calls = turn.get("tool_calls")
    if calls and turn.get("role") == "assistant":
        turn = {"content": "", **turn, "tool_calls": [_call(call, where) for call in _list(calls, "tool_calls", where)]}
    elif calls:
        raise DataError(f"{where}: only the assistant has tool_calls, got {turn!r:.80}")
    else:
        turn.pop("tool_calls", None)
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        raise DataError(f"{where}: each turn needs a role and a content, both text, got {turn!r:.80}")
    return turn


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call whose arguments are an object: OpenAI writes them as JSON text, templates do so themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: each of tool_calls needs a function with a name, got {call!r:.80}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"{where}: the arguments of {function['name']} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: the arguments of {function['name']} must be an object, got {arguments!r:.80}")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of JSON schemas, or the JSON text of one."""
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{row.where}: column tools is not JSON: {error}") from error
    return _list(tools, "tools", row.where) if tools else None


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise DataError(f"{where}: {name} must be a list of objects, got {value!r:.80}")
    return value


class Conversation:
    """Turns as a tokenizer's chat template writes them."""

    def __init__(self, read: Turns, where: str, tokenizer: Any) -> None:
        """
        Args:
            read: the turns; the last is the assistant's.
            where: they stand.
            tokenizer: has a chat template.

        Raises:
            DataError: the template refuses them, or leaves turns, tools or calls of them out.
        """
        self.turns = read.turns
        self._tools = read.tools
        self._where = where
        self._tokenizer = tokenizer
        self.whole = self._write(self.turns)
        """All of it."""
        if self._tools and self._write(self.turns, tools=False) == self.whole:
            self._refuse("leaves the column tools out; give one that writes tools: data.chat_template")
        if any("tool_calls" in turn for turn in self.turns) and self._write(_renamed(self.turns)) == self.whole:
            self._refuse("leaves tool_calls out; give one that writes them: data.chat_template")
        for place, turn in enumerate(self.turns):
            if self._leaves_out(place):
                wrong = f"leaves turn {place + 1} out, of role {turn['role']!r}"
                self._refuse(f"{wrong}; mend the role, or give one that writes it: data.chat_template")

    @cached_property
    def prompt_end(self) -> int:
        """Characters before the last answer, without the space between."""
        return self._end_of_prompt(len(self.turns) - 1)

    def answers(self) -> list[tuple[int, int]]:
        """Where in the whole each turn of the assistant stands, first and past the last character.

        By the template's own `{% generation %}` marks where it has them. Else from the end of what asks for a turn to
        the end of that, each written as a conversation of its own.

        Raises:
            DataError: these are written otherwise than within the whole.
        """
        if marks_answers(self._tokenizer.chat_template):
            return self._marked()
        found = []
        for place, turn in enumerate(self.turns):
            if turn["role"] != "assistant":
                continue
            if place == 0:
                raise DataError(f"{self._where}: loss_on assistant: nothing asks for the first turn")
            until = self._write(self.turns[: place + 1])
            if not self.whole.startswith(until):
                self._refuse(
                    f"writes turn {place + 1} otherwise where others follow; loss_on completion needs the last"
                )
            found.append((self._end_of_prompt(place), len(until)))
        return found

    def _leaves_out(self, place: int) -> bool:
        """Whether a turn is not in the whole, as of a role that the template does not know.

        Its text may be written otherwise, or stand in another turn too: then the whole with another text tells. Of a
        turn that calls tools some templates (Llama 3.1's) write the calls alone.
        """
        turn = self.turns[place]
        text = turn["content"].strip()
        if not text or "tool_calls" in turn or (turn["role"] in ("user", "assistant") and text in self.whole):
            return False
        reworded = {**turn, "content": f"{turn['content']}-"}
        return self._write([*self.turns[:place], reworded, *self.turns[place + 1 :]]) == self.whole

    def _end_of_prompt(self, place: int) -> int:
        prompt = self._write(self.turns[:place], add_generation_prompt=True).rstrip()
        if not self.whole.startswith(prompt):
            self._refuse("renders the prompt alone otherwise than with its answer")
        return len(prompt)

    def _marked(self) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self._tokenizer
        written, marked = render_jinja_template(
            [self.turns],
            tools=self._tools,
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        if written != [self.whole] or not marked[0]:
            self._refuse("marks no answer that it writes")
        # Space before an answer belongs to it, as where there are no marks: a prompt ends before it.
        return [(len(self.whole[: int(start)].rstrip()), int(end)) for start, end in marked[0]]

    def _write(self, turns: list[dict[str, Any]], tools: bool = True, **options: Any) -> str:
        from jinja2 import TemplateError

        given = self._tools if tools else None
        try:
            return str(self._tokenizer.apply_chat_template(turns, tools=given, tokenize=False, **options))
        except (TemplateError, TypeError) as error:  # TypeError: it adds what is no text
            self._refuse(f"refuses this conversation: {error}")

    def _refuse(self, why: str) -> NoReturn:
        raise DataError(f"{self._where}: the chat template {why}")


def _renamed(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with other names in its calls."""
    return [
        {**turn, "tool_calls": [{**call, "function": {**call["function"], "name": "-"}} for call in turn["tool_calls"]]}
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]
