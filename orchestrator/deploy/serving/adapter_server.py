"""Answer many requests at once, with transformers' continuous batching (the engine of `transformers serve`).

Waiting requests are served in order of arrival. Active requests share each forward pass; a new one joins at the next
pass. Adapters share the weights of one base, but each has its own modules, thread and KV cache: a pass packs several
requests into one row, in which PEFT cannot mix adapters.
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
from orchestrator.deploy.chat import MIN_TEMPERATURE, PromptForm, Sampling, open_prompt_form
from orchestrator.deploy.load import attach_adapter
from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.positions import independent_length, position_limit

CACHE_TOKENS = 16_384
"""Tokens in the preallocated KV cache of an adapter, for all its requests together."""

_PASS_TOKENS = 512
"""Tokens per forward pass; longer prompts take several. The attention mask is (_PASS_TOKENS, CACHE_TOKENS)."""

_WATCH_S = 5
"""A request that waits this long without output checks whether the thread is alive."""


@dataclass(frozen=True)
class AnswerPiece:
    """The next part of an answer."""

    text: str
    num_tokens: int
    """Number of tokens of the answer so far, including the stop token."""
    finish_reason: Literal["stop", "length"] | None = None
    """Set in the last piece. stop: a stop token or stop string was reached; length: `max_new_tokens` were generated."""


class AdapterServer:
    """An adapter on its base that answers requests, from `start` to `stop`, in its own thread."""

    def __init__(self, model: Any, form: PromptForm) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.form = form
        plain = model.get_base_model()  # the base model with the adapter's layers injected
        limits = position_limit(plain.config), independent_length(plain.config)
        self.context = min([CACHE_TOKENS, *(limit for limit in limits if limit is not None)])
        """Maximum number of tokens of a prompt and its answer together. Up to it, requests do not change each other."""
        self._stop_ids = stops_of(plain)
        config = ContinuousBatchingConfig(
            per_request_processors=True,
            max_batch_tokens=_PASS_TOKENS,
            auto_switch_to_flash=False,  # it may fetch kernels from the hub
            use_cuda_graph=False,
            use_async_batching=False,
        )
        config.num_blocks = CACHE_TOKENS // config.page_size
        # Requests set their own temperature and top_p. Values other than the defaults here enable both processors.
        sampled = GenerationConfig(
            do_sample=True,
            temperature=0.5,
            top_p=0.5,
            eos_token_id=self._stop_ids,
            pad_token_id=form.tokenizer.pad_token_id,
        )
        self._manager = plain.init_continuous_batching(sampled, config)

    @property
    def alive(self) -> bool:
        """Whether the thread is running without an error."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    def start(self) -> None:
        """Start the thread, and generate a first token as a test.

        Raises:
            RequestError: transformers cannot batch requests to this model.
        """
        self._manager.start()
        self._manager.add_request(
            self.form.ids("?"), max_new_tokens=1, eos_token_id=self._stop_ids, **_arguments(Sampling())
        )
        first = None
        while first is None and self.alive:
            first = self._manager.get_result(timeout=1)
        fault = first.error if first else self._manager.background_thread_status.fatal_error
        if fault is not None or first is None:
            self.stop()
            raise RequestError(f"transformers' continuous batching cannot answer with this base: {fault}")

    def stop(self) -> None:
        """Stop the thread; active requests fail."""
        self._manager.stop(timeout=_WATCH_S, hard_stop=True)

    def plain_ids(self, text: str) -> list[int]:
        """Return the token ids (tokens,) of a text to continue, with BOS if the training rows had one."""
        tokenizer, data = self.form.tokenizer, self.form.data
        return encode_prompt(text, tokenizer, data) if data else list(tokenizer(text)["input_ids"])

    async def answer(
        self, ids: list[int], max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = (), strip: bool = False
    ) -> AsyncGenerator[AnswerPiece, None]:
        """Yield the answer piece by piece. Closing the generator cancels the request.

        Args:
            ids: the prompt, (tokens,); its length plus `max_new_tokens` must not exceed `context`.
            max_new_tokens: maximum number of tokens of the answer.
            sampling: how tokens are selected; `top_k` and `seed` have no effect.
            stop: stop strings; the answer ends before the first one.
            strip: strip whitespace at both ends.

        Raises:
            OrchestratorError: the thread has died, or this request failed.
        """
        request, outputs = uuid4().hex, asyncio.Queue[Any]()
        text_stream, seen, finished = _TextStream(self.form.tokenizer, stop, strip), 0, False
        self._manager.register_result_handler(request, outputs.put_nowait)
        self._manager.add_request(
            ids, request, max_new_tokens, streaming=True, eos_token_id=self._stop_ids, **_arguments(sampling)
        )
        try:
            while not (finished or text_stream.stopped):
                output = await self._next(outputs)
                finished = output.is_finished()
                for token in output.generated_tokens[seen:]:
                    seen += 1
                    if token not in self._stop_ids and text_stream.add(token):
                        break
                if text := text_stream.take_settled():
                    yield AnswerPiece(text, seen)
            is_stopped = text_stream.stopped or output.generated_tokens[-1] in self._stop_ids
            yield AnswerPiece(text_stream.take_rest(), seen, "stop" if is_stopped else "length")
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
                raise OrchestratorError("the thread that generates answers has died", "See the server's log.") from None
            if output.error is not None:
                raise OrchestratorError(f"the answer failed: {output.error}")
            return output


@contextmanager
def open_adapter_servers(adapters: Sequence[AdapterRef]) -> Iterator[list[AdapterServer]]:
    """Start a server for each adapter, all on one loaded base. They are stopped on exit.

    Args:
        adapters: adapters of the same base.

    Raises:
        RequestError: the base cannot be loaded, an adapter does not match it, or transformers cannot batch requests to
            it.
    """
    forms = [open_prompt_form(adapter) for adapter in adapters]
    base = load_base(adapters[0].base)
    started: list[AdapterServer] = []
    try:
        for adapter, form in zip(adapters, forms, strict=True):
            server = AdapterServer(attach_adapter(share_modules(base, own_biases=True), adapter), form)
            server.start()
            started.append(server)
        yield started
    finally:
        for server in started:
            server.stop()


def _arguments(sampling: Sampling) -> dict[str, float]:
    """Return the sampling arguments of `add_request`. With `top_p` 0, only the most likely token remains."""
    if sampling.temperature < MIN_TEMPERATURE:
        return {"temperature": 1.0, "top_p": 0.0}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p}


class _TextStream:
    """Decodes tokens one by one. Text that may be part of a stop string, or trailing whitespace, is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], strip: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = stop
        self._strip = strip
        self._text = ""
        self._num_taken = 0
        """Number of characters already taken."""
        self.stopped = False

    def add(self, token: int) -> bool:
        """Add the next token.

        Returns:
            Whether a stop string was reached; the text then ends before it.
        """
        self._text += self._stream.step(self._tokenizer, token) or ""
        at = min((self._text.find(stop) for stop in self._stop if stop in self._text), default=-1)
        if at >= 0:
            self._text, self.stopped = self._text[:at], True
        return self.stopped

    def take_settled(self) -> str:
        """Take the new text that later tokens cannot change."""
        held_back = [n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])]
        return self._take(self._text[: len(self._text) - max(held_back, default=0)])

    def take_rest(self) -> str:
        """Take all remaining text."""
        return self._take(self._text)

    def _take(self, text: str) -> str:
        text = text.strip() if self._strip else text
        new = text[self._num_taken :]
        self._num_taken += len(new)
        return new
