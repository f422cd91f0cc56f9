"""Ask a trained adapter, or the base beneath it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from orchestrator.adapters.generate import GREEDY
from orchestrator.adapters.stops import stops_of
from orchestrator.data import encode_prompt, render_prompt
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.load import load_model, load_own_tokenizer
from orchestrator.errors import RequestError
from orchestrator.spec.sections import DataSection

Turn = dict[str, str]
"""`role` and `content`."""

Question = str | Sequence[Turn]
"""Plain text, or a conversation that the model is to go on with."""


@dataclass(frozen=True)
class PromptForm:
    """How a question is put to the model: as the training rows were written."""

    tokenizer: Any
    data: DataSection | None
    """How they were; None for an adapter that does not say."""
    system: str | None = None
    """Stands before every conversation that has no system turn of its own."""

    @property
    def takes_turns(self) -> bool:
        """Whether conversations can be asked; else each question stands alone."""
        return self.data.has_turns if self.data else self.tokenizer.chat_template is not None

    def ids(self, question: Question) -> list[int]:
        """Token ids (tokens,) of what the model is to go on with.

        Raises:
            RequestError: the form has no place for these turns.
        """
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        if self.takes_turns:
            return self._ids_of_turns(turns)
        if [turn["role"] for turn in turns] != ["user"]:
            trained = f"on format {self.data.format}" if self.data else "without a chat template"
            raise RequestError(
                f"the adapter was trained {trained}, which has no place for a system prompt or earlier turns",
                "Give single questions; only formats messages and sharegpt know conversations.",
            )
        text = turns[0]["content"]
        if self.data is None:
            return list(self.tokenizer(text)["input_ids"])
        return encode_prompt(render_prompt(text, self.data, self.tokenizer), self.tokenizer, self.data)

    def _ids_of_turns(self, turns: list[Turn]) -> list[int]:
        text = self._render(turns)
        if turns[0]["role"] == "system" and text == self._render(turns[1:]):
            raise RequestError("the chat template of the tokenizer leaves a system prompt out")
        if self.data is None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # A training prompt ends without space: see `data.render`.
        return encode_prompt(text.rstrip(), self.tokenizer, self.data)

    def _render(self, turns: list[Turn]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise RequestError(f"the chat template of the tokenizer refuses turns of {roles}: {error}") from error


COLD = 1e-3
"""A temperature below is taken as 0: logits divided by it would be no numbers."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken."""

    temperature: float = 0.0
    """0 takes the likeliest one each time, and the rest has no meaning."""
    top_p: float = 1.0
    """Only of the likeliest tokens that have this share together (nucleus, arXiv 1904.09751)."""
    top_k: int = 0
    """Only of so many likeliest tokens; 0 is of all."""
    seed: int | None = None
    """The same answer each time."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        if self.temperature < COLD:
            return GREEDY
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, "use_cache": True, **drawn}

    def begin(self) -> None:
        """Start the draws anew, where there is a seed."""
        import torch

        if self.seed is not None:
            torch.manual_seed(self.seed)


def sampling_of(temperature: float, top_p: float | None, top_k: int | None, seed: int | None) -> Sampling:
    """What a person has asked for.

    Raises:
        RequestError: something is drawn by that has no effect at temperature 0.
    """
    given = {"--top-p": top_p, "--top-k": top_k, "--seed": seed}
    idle = [name for name, value in given.items() if value is not None]
    if temperature == 0 and idle:
        raise RequestError(f"{idle[0]}: has no effect on greedy answers", "Give a --temperature above 0.")
    return Sampling(temperature, 1.0 if top_p is None else top_p, top_k or 0, seed)


@dataclass(frozen=True)
class Chat:
    """An adapter on its base, ready to answer."""

    model: Any
    form: PromptForm

    @property
    def tokenizer(self) -> Any:
        return self.form.tokenizer

    def stream(
        self, question: Question, max_new_tokens: int, base_only: bool = False, sampling: Sampling = Sampling()
    ) -> Iterator[str]:
        """Pieces of the answer as they come.

        Args:
            question: put into the form of the training rows.
            max_new_tokens: tokens the answer may have.
            base_only: answer without the adapter.
            sampling: how the tokens are taken.

        Raises:
            RequestError: the form has no place for these turns.
        """
        import torch
        from transformers import StoppingCriteriaList

        inputs = torch.tensor([self.form.ids(question)], device=self.model.device)
        streamer = _streamer(self.tokenizer, stops_of(self.model))
        failures: list[BaseException] = []
        left = Event()

        def has_left(ids: Any, *_: Any, **__: Any) -> Any:
            return torch.full((len(ids),), left.is_set(), device=ids.device)

        def generate() -> None:
            with self.model.disable_adapter() if base_only else nullcontext():
                try:
                    sampling.begin()
                    self.model.generate(
                        input_ids=inputs,
                        attention_mask=torch.ones_like(inputs),
                        streamer=streamer,
                        max_new_tokens=max_new_tokens,
                        pad_token_id=self.tokenizer.pad_token_id,
                        stopping_criteria=StoppingCriteriaList([has_left]),
                        **sampling.arguments,
                    )
                except BaseException as error:  # raised again below, in the caller's thread
                    failures.append(error)
                    streamer.end()

        thread = Thread(target=generate, name="generate", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # who leaves early ends it: until then the model is in the thread's hands
            left.set()
            thread.join()
        if failures:
            raise failures[0]


def _streamer(tokenizer: Any, stops: Sequence[int]) -> Any:
    """Text of an answer as it grows, without its stop token, which need not be a special one."""
    from transformers import TextIteratorStreamer

    class Streamer(TextIteratorStreamer):  # type: ignore[misc]  # mypy skips transformers
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value) not in stops:
                super().put(value)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Conversation:
    """Questions that follow each other. A form without turns forgets each one at once."""

    def __init__(self, chat: Chat, base_only: bool = False) -> None:
        self._chat = chat
        self._base_only = base_only
        self._turns: list[Turn] = []

    def ask(self, question: str, max_new_tokens: int, sampling: Sampling = Sampling()) -> Iterator[str]:
        """Pieces of the answer; once it is whole, it is part of the conversation. See `Chat.stream`."""
        turns = [*self._turns, {"role": "user", "content": question}]
        pieces = []
        for piece in self._chat.stream(turns, max_new_tokens, self._base_only, sampling):
            pieces.append(piece)
            yield piece
        if self._chat.form.takes_turns:
            self._turns = [*turns, {"role": "assistant", "content": "".join(pieces).strip()}]

    def clear(self) -> None:
        """Forget what was said."""
        self._turns = []


def open_prompt_form(subject: AdapterRef, system: str | None = None) -> PromptForm:
    """The form of an adapter's questions; its model is not loaded.

    Raises:
        RequestError: there is no tokenizer, or no place for a system prompt.
    """
    form = PromptForm(load_own_tokenizer(subject), subject.config.data if subject.config else None, system)
    form.ids("?")
    return form


def question_template(form: PromptForm) -> str:
    """A form of single questions as a chat template (Jinja, one line): the same tokens as `PromptForm.ids`."""
    tokenizer, mark = form.tokenizer, "\x00"
    # A template may name the question's column several times.
    literals = (render_prompt(mark, form.data, tokenizer) if form.data else mark).split(mark)
    if form.ids("?")[0] == tokenizer.bos_token_id and not literals[0].startswith(tokenizer.bos_token):
        literals[0] = tokenizer.bos_token + literals[0]
    text = " ~ messages[0]['content'] ~ ".join(json.dumps(literal, ensure_ascii=False) for literal in literals)
    # A training prompt ends without space; an adapter that does not say is asked as it is written.
    ends = ".rstrip()" if form.data else ""
    return (
        "{% if messages | length != 1 %}{{ raise_exception('the adapter was trained on single questions') }}{% endif %}"
        f"{{{{ ({text}){ends} }}}}"
    )


def open_chat(subject: AdapterRef, form: PromptForm | None = None) -> Chat:
    """Load an adapter and its base, in the form it was trained in.

    Raises:
        RequestError: its base cannot be loaded.
    """
    form = form or open_prompt_form(subject)
    return Chat(load_model(subject), form)
