"""Chat with a trained adapter, or with its base alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from orchestrator.adapters.generate import GREEDY, require_room
from orchestrator.adapters.stops import stops_of
from orchestrator.data import encode_prompt, render_prompt
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.load import load_model, load_own_tokenizer
from orchestrator.errors import RequestError
from orchestrator.spec.sections import DataSection

Turn = dict[str, str]
"""A turn of a conversation, with `role` and `content`."""

Question = str | Sequence[Turn]
"""A single question as plain text, or a conversation that the model continues."""


@dataclass(frozen=True)
class PromptForm:
    """The prompt format of an adapter: that of its training rows."""

    tokenizer: Any
    data: DataSection | None
    """The data section of the training; None if the adapter does not record it."""
    system: str | None = None
    """System prompt for conversations that do not begin with a system turn."""

    @property
    def takes_turns(self) -> bool:
        """Whether the form supports conversations; otherwise each question is independent."""
        return self.data.has_turns if self.data else self.tokenizer.chat_template is not None

    def ids(self, question: Question) -> list[int]:
        """Return the token ids (tokens,) of the prompt.

        Raises:
            RequestError: the form does not support these turns.
        """
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        if self.takes_turns:
            return self._ids_of_turns(turns)
        if [turn["role"] for turn in turns] != ["user"]:
            trained = f"on format {self.data.format}" if self.data else "without a chat template"
            raise RequestError(
                f"the adapter was trained {trained}, which has no system prompt and no earlier turns",
                "Ask single questions; only the formats messages and sharegpt support conversations.",
            )
        text = turns[0]["content"]
        if self.data is None:
            return list(self.tokenizer(text)["input_ids"])
        return encode_prompt(render_prompt(text, self.data, self.tokenizer), self.tokenizer, self.data)

    def _ids_of_turns(self, turns: list[Turn]) -> list[int]:
        text = self._render(turns)
        if turns[0]["role"] == "system" and text == self._render(turns[1:]):
            raise RequestError(
                "the chat template of the tokenizer ignores system prompts", "Leave the system prompt out."
            )
        if self.data is None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # Prompts of training rows have no trailing whitespace, see `data.render`.
        return encode_prompt(text.rstrip(), self.tokenizer, self.data)

    def _render(self, turns: list[Turn]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise RequestError(f"the chat template of the tokenizer rejects turns of {roles}: {error}") from error


MIN_TEMPERATURE = 1e-3
"""Lower temperatures count as 0: dividing logits by them would overflow."""


@dataclass(frozen=True)
class Sampling:
    """Settings for the selection of the next token."""

    temperature: float = 0.0
    """0 decodes greedily, and the other fields have no effect."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this (nucleus sampling, arXiv 1904.09751)."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 for all tokens."""
    seed: int | None = None
    """Seed of the random draws, for repeatable answers."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        if self.temperature < MIN_TEMPERATURE:
            return GREEDY
        return {
            "do_sample": True,
            "use_cache": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }

    def begin(self) -> None:
        """Seed torch's random generator, if there is a seed."""
        import torch

        if self.seed is not None:
            torch.manual_seed(self.seed)


def sampling_of(temperature: float, top_p: float | None, top_k: int | None, seed: int | None) -> Sampling:
    """Build the sampling from command-line options.

    Raises:
        RequestError: an option is set that has no effect at temperature 0.
    """
    given = {"--top-p": top_p, "--top-k": top_k, "--seed": seed}
    idle = [name for name, value in given.items() if value is not None]
    if temperature == 0 and idle:
        raise RequestError(f"{idle[0]}: has no effect on greedy answers", "Give a --temperature above 0.")
    return Sampling(temperature, 1.0 if top_p is None else top_p, top_k or 0, seed)


@dataclass(frozen=True)
class Chat:
    """An adapter loaded on its base, with its prompt form."""

    model: Any
    form: PromptForm

    @property
    def tokenizer(self) -> Any:
        return self.form.tokenizer

    def stream(
        self, question: Question, max_new_tokens: int, base_only: bool = False, sampling: Sampling = Sampling()
    ) -> Iterator[str]:
        """Yield the answer piece by piece, as it is generated.

        Args:
            question: a question or a conversation; it is put into the prompt form.
            max_new_tokens: maximum number of tokens of the answer.
            base_only: answer without the adapter.
            sampling: how tokens are selected.

        Raises:
            RequestError: the form does not support these turns, or prompt and answer need more positions than the base
                has.
        """
        import torch
        from transformers import StoppingCriteriaList

        ids = self.form.ids(question)
        require_room(self.model, len(ids), max_new_tokens)
        inputs = torch.tensor([ids], device=self.model.device)
        streamer = _streamer(self.tokenizer, stops_of(self.model))
        failures: list[BaseException] = []
        cancelled = Event()

        def is_cancelled(ids: Any, *_: Any, **__: Any) -> Any:
            return torch.full((len(ids),), cancelled.is_set(), device=ids.device)

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
                        stopping_criteria=StoppingCriteriaList([is_cancelled]),
                        **sampling.arguments,
                    )
                except BaseException as error:  # raised again below, in the caller's thread
                    failures.append(error)
                    streamer.end()

        thread = Thread(target=generate, name="generate", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # a caller that stops early cancels the generation; until the thread ends, it uses the model
            cancelled.set()
            thread.join()
        if failures:
            raise failures[0]


def _streamer(tokenizer: Any, stops: Sequence[int]) -> Any:
    """Build a streamer of the answer's text. It drops stop tokens, also those that are not special tokens."""
    from transformers import TextIteratorStreamer

    class Streamer(TextIteratorStreamer):  # type: ignore[misc]  # mypy skips transformers
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value) not in stops:
                super().put(value)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Conversation:
    """A conversation with several questions. If the form has no turns, each question is independent."""

    def __init__(self, chat: Chat, base_only: bool = False) -> None:
        self._chat = chat
        self._base_only = base_only
        self._turns: list[Turn] = []

    def ask(self, question: str, max_new_tokens: int, sampling: Sampling = Sampling()) -> Iterator[str]:
        """Yield the answer piece by piece; a complete answer is added to the conversation. See `Chat.stream`."""
        turns = [*self._turns, {"role": "user", "content": question}]
        pieces = []
        for piece in self._chat.stream(turns, max_new_tokens, self._base_only, sampling):
            pieces.append(piece)
            yield piece
        if self._chat.form.takes_turns:
            self._turns = [*turns, {"role": "assistant", "content": "".join(pieces).strip()}]

    def clear(self) -> None:
        """Forget all turns."""
        self._turns = []


def open_prompt_form(adapter: AdapterRef, system: str | None = None) -> PromptForm:
    """Load the prompt form of an adapter, without its model.

    Raises:
        RequestError: there is no tokenizer, or the form does not support a system prompt.
    """
    form = PromptForm(load_own_tokenizer(adapter), adapter.config.data if adapter.config else None, system)
    form.ids("?")
    return form


def question_template(form: PromptForm) -> str:
    """Write a form of single questions as a Jinja chat template (one line). It gives the tokens of `PromptForm.ids`."""
    tokenizer, mark = form.tokenizer, "\x00"
    # A template may contain the question's column several times.
    literals = (render_prompt(mark, form.data, tokenizer) if form.data else mark).split(mark)
    if form.ids("?")[0] == tokenizer.bos_token_id and not literals[0].startswith(tokenizer.bos_token):
        literals[0] = tokenizer.bos_token + literals[0]
    text = " ~ messages[0]['content'] ~ ".join(json.dumps(literal, ensure_ascii=False) for literal in literals)
    # Prompts of training rows have no trailing whitespace. Without a data section, the question is used as given.
    ends = ".rstrip()" if form.data else ""
    return (
        "{% if messages | length != 1 %}{{ raise_exception('the adapter was trained on single questions') }}{% endif %}"
        f"{{{{ ({text}){ends} }}}}"
    )


def open_chat(adapter: AdapterRef, form: PromptForm | None = None) -> Chat:
    """Load an adapter on its base for chatting.

    Args:
        adapter: the adapter.
        form: its prompt form; default from `open_prompt_form`.

    Raises:
        RequestError: the base cannot be loaded, or the adapter does not match it.
    """
    form = form or open_prompt_form(adapter)
    return Chat(load_model(adapter), form)
