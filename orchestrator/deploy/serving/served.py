"""Adapters that answer many at once: transformers' continuous batching, the engine of its own `transformers serve`.

Waiting requests go first come, first served; those under way share each forward pass, and a new one joins at the next.
Each adapter has modules, a thread and a cache of its own over the weights of one base: PEFT cannot mix adapters in the
packed row that such a pass is.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from orchestrator.adapters.stops import stops_of
from orchestrator.base import load_base, share_modules
from orchestrator.data import encode_prompt
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.chat import COLD, PromptForm, Sampling, open_prompt_form
from orchestrator.deploy.load import put_on
from orchestrator.errors import OrchestratorError, RequestError

CACHE_TOKENS = 16_384
"""Tokens whose keys and values an adapter keeps, of all its requests together. Preallocated."""

_PASS_TOKENS = 512
"""Tokens a forward pass; longer prompts are read in several. Its attention mask has so many rows of CACHE_TOKENS."""

_WATCH_S = 5
"""A request that hears nothing for so long looks whether its thread lives."""


@dataclass(frozen=True)
class AnswerPiece:
    """What was added to an answer."""

    text: str
    num_tokens: int
    """Tokens of the answer so far, its end token included."""
    finish_reason: Literal["stop", "length"] | None = None
    """In the last piece: it came to its end or to a stop string, or had its `max_new_tokens`."""


class AdapterServer:
    """An adapter on its base. Begins with `start`, and holds a thread until `stop`."""

    def __init__(self, model: Any, form: PromptForm) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.form = form
        plain = model.get_base_model()  # with the adapter's layers in it
        positions = getattr(plain.config.get_text_config(), "max_position_embeddings", None)
        self.context = min(positions or CACHE_TOKENS, CACHE_TOKENS)
        """Tokens that a prompt and its answer may have together."""
        self._ends = stops_of(plain)
        config = ContinuousBatchingConfig(
            per_request_processors=True,
            max_batch_tokens=_PASS_TOKENS,
            auto_switch_to_flash=False,  # it may fetch kernels from the hub
            use_cuda_graph=False,
            use_async_batching=False,
        )
        config.num_blocks = CACHE_TOKENS // config.page_size
        # Each request brings its own temperature and top_p; those given here only make it ask for them.
        drawn = GenerationConfig(
            do_sample=True,
            temperature=0.5,
            top_p=0.5,
            eos_token_id=self._ends,
            pad_token_id=form.tokenizer.pad_token_id,
        )
        self._manager = plain.init_continuous_batching(drawn, config)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    def start(self) -> None:
        """Begin to answer, once a first token has shown that it can be done.

        Raises:
            RequestError: transformers cannot batch requests to this model.
        """
        self._manager.start()
        self._manager.add_request(
            self.form.ids("?"), max_new_tokens=1, eos_token_id=self._ends, **_arguments(Sampling())
        )
        first = None
        while first is None and self.alive:
            first = self._manager.get_result(timeout=1)
        fault = first.error if first else self._manager.background_thread_status.fatal_error
        if fault is not None or first is None:
            self.stop()
            raise RequestError(f"transformers' continuous batching cannot answer with this base: {fault}")

    def stop(self) -> None:
        """End the thread; what is under way fails."""
        self._manager.stop(timeout=_WATCH_S, hard_stop=True)

    def plain_ids(self, text: str) -> list[int]:
        """Token ids (tokens,) of a text to go on with as it stands, after BOS where the training rows had one."""
        tokenizer, data = self.form.tokenizer, self.form.data
        return encode_prompt(text, tokenizer, data) if data else list(tokenizer(text)["input_ids"])

    async def answer(
        self, ids: list[int], max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = (), strip: bool = False
    ) -> AsyncGenerator[AnswerPiece, None]:
        """Pieces of the answer as they come; who leaves early ends it.

        Args:
            ids: the prompt (tokens,); with `max_new_tokens` not more than `context`.
            max_new_tokens: tokens the answer may have.
            sampling: how the tokens are taken; `top_k` and `seed` have no effect.
            stop: the answer ends before the first of these.
            strip: leave out space at its ends.

        Raises:
            OrchestratorError: the thread has died.
        """
        request, outputs = uuid4().hex, asyncio.Queue[Any]()
        words, seen, finished = _Words(self.form.tokenizer, stop, strip), 0, False
        self._manager.register_result_handler(request, outputs.put_nowait)
        self._manager.add_request(
            ids, request, max_new_tokens, streaming=True, eos_token_id=self._ends, **_arguments(sampling)
        )
        try:
            while not (finished or words.stopped):
                output = await self._next(outputs)
                finished = output.is_finished()
                for token in output.generated_tokens[seen:]:
                    seen += 1
                    if token not in self._ends and words.add(token):
                        break
                if text := words.settled():
                    yield AnswerPiece(text, seen)
            by_itself = words.stopped or output.generated_tokens[-1] in self._ends
            yield AnswerPiece(words.rest(), seen, "stop" if by_itself else "length")
        finally:
            if not finished:
                self._manager.cancel_request(request)
                self._manager.output_router.result_handlers.pop(request, None)

    async def _next(self, outputs: "asyncio.Queue[Any]") -> Any:
        while True:
            try:
                output = await asyncio.wait_for(outputs.get(), _WATCH_S)
            except TimeoutError:
                if self.alive:
                    continue
                raise OrchestratorError("the thread that answers has died; its log says why") from None
            if output.error is not None:
                raise OrchestratorError(f"the answer failed: {output.error}")
            return output


@contextmanager
def open_served(subjects: Sequence[AdapterRef]) -> Iterator[list[AdapterServer]]:
    """Adapters side by side on one base, started; stopped at the end.

    Args:
        subjects: all of one base.

    Raises:
        RequestError: the base cannot be loaded, or transformers cannot batch requests to it.
    """
    forms = [open_prompt_form(subject) for subject in subjects]
    base = load_base(subjects[0].base)
    started: list[AdapterServer] = []
    try:
        for subject, form in zip(subjects, forms, strict=True):
            served = AdapterServer(put_on(share_modules(base, own_biases=True), subject), form)
            served.start()
            started.append(served)
        yield started
    finally:
        for served in started:
            served.stop()


def _arguments(sampling: Sampling) -> dict[str, float]:
    """For `add_request`. A `top_p` of 0 leaves the likeliest token alone."""
    if sampling.temperature < COLD:
        return {"temperature": 1.0, "top_p": 0.0}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p}


class _Words:
    """Text of tokens as they come. What may yet turn out to be (part of) a stop string, or space at the end, waits."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], strip: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = stop
        self._strip = strip
        self._text = ""
        self._given = 0
        """Characters handed out."""
        self.stopped = False

    def add(self, token: int) -> bool:
        """Take the next token in.

        Returns:
            Whether the text came to a stop string, and ends before it.
        """
        self._text += self._stream.step(self._tokenizer, token) or ""
        at = min((self._text.find(stop) for stop in self._stop if stop in self._text), default=-1)
        if at >= 0:
            self._text, self.stopped = self._text[:at], True
        return self.stopped

    def settled(self) -> str:
        """Text that nothing to come can change, from where it was last handed out."""
        waiting = [n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])]
        return self._hand_out(self._text[: len(self._text) - max(waiting, default=0)])

    def rest(self) -> str:
        """All that is left."""
        return self._hand_out(self._text)

    def _hand_out(self, text: str) -> str:
        text = text.strip() if self._strip else text
        new = text[self._given :]
        self._given += len(new)
        return new
