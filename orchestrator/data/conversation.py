"""Conversations as a tokenizer's chat template writes them, and what of them is in the loss."""

import re
from functools import cached_property
from typing import Any, NoReturn

from orchestrator.data.bad_rows import RowError
from orchestrator.data.turns import Turns
from orchestrator.spec.template import marks_answers

Span = tuple[int, float]
"""First and past the last character of a text."""

_SAID = ("reasoning_content", "reasoning", "thinking", "function_call")
"""Keys of a turn that hold something the assistant says."""

_GIVE_ONE = "give one that writes it: data.chat_template"


class Conversation:
    """Turns as a tokenizer's chat template writes them."""

    def __init__(self, read: Turns, where: str, tokenizer: Any) -> None:
        """
        Args:
            read: the turns; the last is the assistant's.
            where: they stand.
            tokenizer: has a chat template.

        Raises:
            RowError: the template refuses them, or leaves out turns, tools, calls, or reasoning of them.
        """
        self.turns = read.turns
        self._marks = read.marks
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
                self._refuse(f"{wrong}; mend the role, or {_GIVE_ONE}", f"leaves a turn of role {turn['role']!r} out")
        for key in _SAID:
            if any(turn.get(key) for turn in self.turns) and not self.reads(key):
                raise RowError(
                    where,
                    f"the chat template leaves {key} of a turn out",
                    f"{_GIVE_ONE.capitalize()}; or one that names {key} in a comment, to leave it out on purpose.",
                )

    def reads(self, key: str) -> bool:
        """Whether the chat template reads this key of turns: it names it, or writes something else without it."""
        if names(self._tokenizer.chat_template, key):
            return True
        without = [{name: value for name, value in turn.items() if name != key} for turn in self.turns]
        return self._write(without) != self.whole

    @cached_property
    def prompt_end(self) -> int:
        """Characters before the last answer, without the space between."""
        return self._end_of_prompt(len(self.turns) - 1)

    def learned(self, loss_on: str) -> list[Span] | None:
        """Parts of the whole that are in the loss; None where these are all of it, or the last answer, by `loss_on`.

        A turn that says it is not trained on (weight: 0) is in no part.

        Raises:
            RowError: nothing is left to learn, or where a turn stands cannot be told.
        """
        untrained = {place for place, mark in enumerate(self._marks) if mark is False}
        if loss_on == "completion":
            if len(self.turns) - 1 in untrained:
                raise RowError(
                    self._where, "the last answer is not trained (weight 0), and loss_on completion is on it"
                )
            return None
        if loss_on == "all":
            return self._all_but(untrained) if untrained else None
        answers = [place for place, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        spans = [span for place, span in self._spans(answers).items() if place not in untrained]
        if not spans:
            raise RowError(self._where, "none of the assistant's turns is trained: each has weight 0")
        return spans

    def _all_but(self, untrained: set[int]) -> list[Span]:
        if len(untrained) == len(self.turns):
            raise RowError(self._where, "no turn is trained: each has weight 0")
        learned: list[Span] = []
        start = 0.0
        for first, end in sorted(self._spans(sorted(untrained)).values()):
            if first > start:
                learned.append((int(start), first))
            start = end
        return [*learned, (int(start), float("inf"))]

    def _spans(self, places: list[int]) -> dict[int, Span]:
        """Where turns stand in the whole.

        Answers by the template's own `{% generation %}` marks where it has them. Else a turn stands from the end of
        what comes before it to the end of it, each written as a conversation of its own.

        Raises:
            RowError: these are written otherwise than within the whole.
        """
        answers = [place for place, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        found: dict[int, Span] = {}
        if marks_answers(self._tokenizer.chat_template) and set(places) & set(answers):
            marked = self._marked()
            if len(marked) == len(answers):
                found = dict(zip(answers, marked, strict=True))
            elif places == answers and all(self._marks[place] is not False for place in places):
                return {-1 - i: span for i, span in enumerate(marked)}  # all of them; whose each is is not known
            else:
                self._refuse(f"marks {len(marked)} answers of {len(answers)}: which has weight 0 cannot be told")
        return {place: found[place] if place in found else self._span(place) for place in places}

    def _span(self, place: int) -> Span:
        is_answer = self.turns[place]["role"] == "assistant"
        if is_answer and place == 0:
            raise RowError(self._where, "loss_on assistant: nothing asks for the first turn")
        until = self._write(self.turns[: place + 1])
        if not self.whole.startswith(until):
            self._refuse(
                f"writes turn {place + 1} otherwise where others follow; loss_on completion needs the last",
                "writes a turn otherwise where others follow",
            )
        if is_answer:
            return self._end_of_prompt(place), len(until)
        return len(self._write(self.turns[:place])) if place else 0, len(until)

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

    def _marked(self) -> list[Span]:
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
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self._refuse(f"refuses this conversation: {error}")

    def _refuse(self, why: str, kind: str = "") -> NoReturn:
        raise RowError(self._where, f"the chat template {why}", kind=f"the chat template {kind or why}")


def names(chat_template: str, key: str) -> bool:
    """Whether a template has a key as a whole word: `enable_thinking` does not name `thinking`."""
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", chat_template) is not None


def _renamed(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same turns with other names in their calls."""
    return [
        {**turn, "tool_calls": [{**call, "function": {**call["function"], "name": "-"}} for call in turn["tool_calls"]]}
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]
