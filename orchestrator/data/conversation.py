"""Conversations as a tokenizer's chat template renders them, and which parts of them are in the loss."""

import re
from functools import cached_property
from typing import Any, NoReturn

from orchestrator.data.bad_rows import RowError
from orchestrator.data.turns import Turns
from orchestrator.spec.template import marks_answers

Span = tuple[int, float]
"""First character of a part of a text, and the one after its last."""

_ASSISTANT_KEYS = ("reasoning_content", "reasoning", "thinking", "function_call")
"""Keys of a turn, other than content, that hold something the assistant says."""

_REMEDY = "give one that writes it: data.chat_template"


class Conversation:
    """A conversation, rendered by a tokenizer's chat template."""

    def __init__(self, read: Turns, where: str, tokenizer: Any) -> None:
        """
        Args:
            read: the turns; the last is the assistant's.
            where: file and line of the row, for messages.
            tokenizer: has a chat template.

        Raises:
            RowError: the template refuses the turns, or leaves out turns, tools, calls or reasoning.
        """
        self.turns = read.turns
        self._marks = read.marks
        self._tools = read.tools
        self._where = where
        self._tokenizer = tokenizer
        self.whole = self._write(self.turns)
        """The rendered text."""
        if self._tools and self._write(self.turns, tools=False) == self.whole:
            self._refuse("leaves the column tools out; give one that writes tools: data.chat_template")
        if any("tool_calls" in turn for turn in self.turns) and self._write(_renamed(self.turns)) == self.whole:
            self._refuse("leaves tool_calls out; give one that writes them: data.chat_template")
        for place, turn in enumerate(self.turns):
            if self._leaves_out(place):
                fault = f"leaves turn {place + 1} out, of role {turn['role']!r}"
                self._refuse(f"{fault}; correct the role, or {_REMEDY}", f"leaves a turn of role {turn['role']!r} out")
        for key in _ASSISTANT_KEYS:
            if any(turn.get(key) for turn in self.turns) and not self.reads(key):
                raise RowError(
                    where,
                    f"the chat template leaves {key} of a turn out",
                    f"{_REMEDY.capitalize()}; or one that names {key} in a comment, to leave it out on purpose.",
                )

    def reads(self, key: str) -> bool:
        """Whether the chat template reads this key of turns: its text names the key, or depends on it."""
        if names(self._tokenizer.chat_template, key):
            return True
        without = [{name: value for name, value in turn.items() if name != key} for turn in self.turns]
        return self._write(without) != self.whole

    @cached_property
    def prompt_end(self) -> int:
        """Number of characters before the last answer, without the space in between."""
        return self._end_of_prompt(len(self.turns) - 1)

    def trained_spans(self, loss_on: str) -> list[Span] | None:
        """Return the parts of the text that are in the loss; None if `loss_on` alone tells them.

        A turn that is marked as not trained (weight: 0) is in no part.

        Raises:
            RowError: no part is left, or the place of a turn in the text cannot be found.
        """
        untrained = {place for place, mark in enumerate(self._marks) if mark is False}
        if loss_on == "completion":
            if len(self.turns) - 1 in untrained:
                raise RowError(
                    self._where, "the last answer has weight 0, but loss_on completion trains only on that answer"
                )
            return None
        if loss_on == "all":
            return self._all_but(untrained) if untrained else None
        answers = [place for place, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        spans = [span for place, span in self._spans(answers).items() if place not in untrained]
        if not spans:
            raise RowError(self._where, "every assistant turn has weight 0, so none is trained on")
        return spans

    def _all_but(self, untrained: set[int]) -> list[Span]:
        if len(untrained) == len(self.turns):
            raise RowError(self._where, "every turn has weight 0, so none is trained on")
        spans: list[Span] = []
        start = 0.0
        for first, end in sorted(self._spans(sorted(untrained)).values()):
            if first > start:
                spans.append((int(start), first))
            start = end
        return [*spans, (int(start), float("inf"))]

    def _spans(self, places: list[int]) -> dict[int, Span]:
        """Return where turns are in the rendered text.

        Answers are found by the template's own `{% generation %}` tags, if it has them. Any other turn begins where
        the conversation before it ends and ends where the conversation with it ends, each rendered by itself.

        Raises:
            RowError: these texts are not the beginning of the whole text.
        """
        answers = [place for place, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        found: dict[int, Span] = {}
        if marks_answers(self._tokenizer.chat_template) and set(places) & set(answers):
            marked = self._marked()
            if len(marked) == len(answers):
                found = dict(zip(answers, marked, strict=True))
            elif places == answers and all(self._marks[place] is not False for place in places):
                return {-1 - i: span for i, span in enumerate(marked)}  # all answers; which is whose is unknown
            else:
                self._refuse(f"marks {len(marked)} answers of {len(answers)}: it is unknown which one has weight 0")
        return {place: found[place] if place in found else self._span(place) for place in places}

    def _span(self, place: int) -> Span:
        is_answer = self.turns[place]["role"] == "assistant"
        if is_answer and place == 0:
            raise RowError(self._where, "loss_on assistant: the first turn is an answer without a question")
        until = self._write(self.turns[: place + 1])
        if not self.whole.startswith(until):
            self._refuse(
                f"renders turn {place + 1} differently if other turns follow; use loss_on: completion",
                "renders a turn differently if other turns follow",
            )
        if is_answer:
            return self._end_of_prompt(place), len(until)
        return len(self._write(self.turns[:place])) if place else 0, len(until)

    def _leaves_out(self, place: int) -> bool:
        """Whether a turn is missing from the rendered text, for instance because the template ignores its role.

        The template may change the turn's text, or another turn may contain it. So the turn counts as missing if the
        rendered text stays the same when its content changes. Some templates (Llama 3.1's) render only the calls of a
        turn that calls tools.
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
            self._refuse("renders the prompt by itself differently than with its answer")
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
        # Space before an answer belongs to the answer, as without tags: a prompt ends before it.
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
    """Whether a template contains a key as a whole word: `enable_thinking` does not name `thinking`."""
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", chat_template) is not None


def _renamed(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same turns with other names in their calls."""
    return [
        {**turn, "tool_calls": [{**call, "function": {**call["function"], "name": "-"}} for call in turn["tool_calls"]]}
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]
