"""Answer many requests at once, with transformers' continuous batching (the engine of `transformers serve`).

Waiting requests are served in order of arrival. Active requests share each forward pass; a new one joins at the next
pass. Adapters share the weights of one base, but each has its own modules, thread and KV cache: a pass packs several
requests into one row, in which PEFT cannot mix adapters.

Bases that transformers cannot batch, such as Qwen3.5, Mamba and DeepSeek-V3, answer one request at a time.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from threading import Event
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
from orchestrator.upstream import keeps_state

CACHE_TOKENS = 16_384
"""Tokens in the preallocated KV cache of an adapter, for all its requests together."""

_Put = Callable[[list[int]], None]
"""Takes new tokens of an answer."""

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


class AdapterServer(ABC):
    """An adapter on its base that answers requests, from `start` to `stop`."""

    note: str | None = None
    """What a user should know of this server."""

    def __init__(self, model: Any, form: PromptForm) -> None:
        self.form = form
        plain = model.get_base_model()  # the base model with the adapter's layers injected
        limits = position_limit(plain.config), independent_length(plain.config)
        self.context = min([CACHE_TOKENS, *(limit for limit in limits if limit is not None)])
        """Maximum number of tokens of a prompt and its answer together. Up to it, requests do not change each other."""
        self._plain = plain
        self._stop_ids = stops_of(plain)

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can answer."""

    @abstractmethod
    def start(self) -> None:
        """Generate a first token as a test.

        Raises:
            RequestError: transformers cannot generate with this model.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop; active requests fail."""

    @abstractmethod
    def _new_tokens(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> AsyncGenerator[list[int]]:
        """Yield the tokens of an answer as they are generated. Closing the generator cancels the request."""

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
            sampling: how tokens are selected; `top_k` has no effect where requests are batched.
            stop: stop strings; the answer ends before the first one.
            strip: strip whitespace at both ends.

        Raises:
            OrchestratorError: the thread has died, or this request failed.
        """
        text_stream, seen, last = _TextStream(self.form.tokenizer, stop, strip), 0, -1
        async with aclosing(self._new_tokens(ids, max_new_tokens, sampling)) as generated:
            async for tokens in generated:
                for last in tokens:
                    seen += 1
                    if last not in self._stop_ids and text_stream.add(last):
                        break
                if text := text_stream.take_settled():
                    yield AnswerPiece(text, seen)
                if text_stream.stopped:
                    break
        is_stopped = text_stream.stopped or last in self._stop_ids
        yield AnswerPiece(text_stream.take_rest(), seen, "stop" if is_stopped else "length")


class BatchingServer(AdapterServer):
    """Answers requests together, with transformers' continuous batching in a thread of its own."""

    def __init__(self, model: Any, form: PromptForm) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        from orchestrator.deploy.serving.seeded import add_seeds

        super().__init__(model, form)
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
        self._manager = self._plain.init_continuous_batching(sampled, config)
        add_seeds(self._manager.logit_processor)

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

    async def _new_tokens(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> AsyncGenerator[list[int]]:
        request, outputs, seen, finished = uuid4().hex, asyncio.Queue[Any](), 0, False
        self._manager.register_result_handler(request, outputs.put_nowait)
        self._manager.add_request(
            ids, request, max_new_tokens, streaming=True, eos_token_id=self._stop_ids, **_arguments(sampling)
        )
        try:
            while not finished:
                output = await self._next(outputs)
                finished = output.is_finished()
                tokens = output.generated_tokens[seen:]
                seen += len(tokens)
                yield tokens
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


class SingleServer(AdapterServer):
    """Answers one request after the other, for bases to which transformers cannot batch requests."""

    note = "transformers cannot batch requests to this base: they are answered one by one"

    def __init__(self, model: Any, form: PromptForm) -> None:
        super().__init__(model, form)
        self._turn = asyncio.Lock()

    @property
    def alive(self) -> bool:
        """Whether it can answer: always, as it has no thread of its own."""
        return True

    def start(self) -> None:
        """Generate a first token as a test.

        Raises:
            RequestError: transformers cannot generate with this model.
        """
        try:
            self._generate(self.form.ids("?"), 1, Sampling(), lambda _: None, Event())
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"transformers cannot generate with this base: {error}") from error

    def stop(self) -> None:
        """Do nothing."""

    async def _new_tokens(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> AsyncGenerator[list[int]]:
        async with self._turn:
            loop, outputs, cancelled = asyncio.get_running_loop(), asyncio.Queue[Any](), Event()

            def put(output: Any) -> None:
                loop.call_soon_threadsafe(outputs.put_nowait, output)

            def generate() -> None:
                try:
                    self._generate(ids, max_new_tokens, sampling, put, cancelled)
                    put(None)
                except Exception as error:
                    put(error)

            running = loop.run_in_executor(None, generate)
            try:
                while (output := await outputs.get()) is not None:
                    if isinstance(output, Exception):
                        raise OrchestratorError(f"the answer failed: {output}") from output
                    yield output
            finally:  # until the thread ends, it uses the model
                cancelled.set()
                await asyncio.shield(running)

    def _generate(
        self,
        ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        put: Callable[[list[int]], None],
        cancelled: Event,
    ) -> None:
        """Generate an answer, and pass on each token."""
        import torch
        from transformers import StoppingCriteriaList
        from transformers.generation.streamers import BaseStreamer

        class Streamer(BaseStreamer):  # type: ignore[misc]  # mypy skips transformers
            is_prompt = True

            def put(self, value: Any) -> None:
                if not self.is_prompt:
                    put(value.reshape(-1).tolist())
                self.is_prompt = False

            def end(self) -> None:
                pass

        def is_cancelled(ids: Any, *_: Any, **__: Any) -> Any:
            return torch.full((len(ids),), cancelled.is_set(), device=ids.device)

        sampling.begin()
        inputs = torch.tensor([ids], device=self._plain.device)
        with torch.no_grad():
            self._plain.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=Streamer(),
                max_new_tokens=max_new_tokens,
                pad_token_id=self.form.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([is_cancelled]),
                **sampling.arguments,
            )


def can_batch(model: Any) -> bool:
    """Return whether transformers can batch requests to a model: all its layers are full or sliding attention.

    Others raise an error while the cache is made (5.23, `continuous_batching/cache.py`), and so does attention with
    compressed keys and values (DeepSeek-V3).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    is_compressed = getattr(config, "kv_lora_rank", None) is not None
    return kinds <= {"full_attention", "sliding_attention"} and not is_compressed and not keeps_state(model)


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
    kind: type[AdapterServer] = BatchingServer if can_batch(base) else SingleServer
    started: list[AdapterServer] = []
    try:
        for adapter, form in zip(adapters, forms, strict=True):
            server = kind(attach_adapter(share_modules(base, own_biases=True), adapter), form)
            server.start()
            started.append(server)
        yield started
    finally:
        for server in started:
            server.stop()


def _arguments(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling arguments of `add_request`. With `top_p` 0, only the most likely token remains."""
    if sampling.temperature < MIN_TEMPERATURE:
        return {"temperature": 1.0, "top_p": 0.0}
    arguments: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return arguments if sampling.seed is None else arguments | {"seed": sampling.seed}


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
