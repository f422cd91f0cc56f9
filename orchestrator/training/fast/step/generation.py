"""Greedy generation for the adapters of many slots at once.

The prompts of all slots go through flat passes that fill the KV cache (`kv_cache`). Then each pass holds the last token
of each answer, the answers of all slots together:

    prompts    slot 0: a a a b b | slot 1: c c c c      one or more passes
    answers    slot 0: a b       | slot 1: c            one pass for each new token
    answers    slot 0: a         | slot 1: c            b has ended

Tokens are those of `generate` of transformers, as far as rounding allows: the likeliest one, until a stop token or the
limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from orchestrator.adapters.generate import MAX_BATCH_TOKENS, batches
from orchestrator.training.fast.ops.protocol import Ops
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder
from orchestrator.training.fast.step.flat_batch import (
    IGNORED,
    WITHOUT_DROPOUT,
    BucketShape,
    FlatBatch,
    Span,
    TokenizedRows,
    split_into_passes,
)
from orchestrator.training.fast.step.kv_cache import CachedInputs, CachePlaces, LayerCache

LENGTH_STEP = 64
"""Caches, and what a pass reads of them, are a multiple of so many tokens long. On a GPU, attention prepares each new
shape anew, and copies a mask whose rows are not aligned."""

CACHE_SHARE = 32
"""A cache takes at most one part in so many of the GPU's memory. The memory plan leaves more than that (`MARGIN`)."""


@dataclass(frozen=True)
class Asked:
    """Prompts for one slot, and when its answers end."""

    slot: int
    prompts: TokenizedRows
    """Their labels are not read."""
    max_new_tokens: int
    stop_tokens: frozenset[int]
    table: dict[str, float]
    """The slot's values of `flat_batch.TABLE`."""
    is_stopping: Callable[[], bool] = lambda: False
    """Returns whether the slot's trial is to end now; its answers then end where they are. Asked before each token."""


@dataclass
class _Answer:
    """An answer that is being generated."""

    asked: Asked
    row: int
    """Number of its prompt."""
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False

    def add(self, token: int) -> None:
        """Add the next token, or end at a stop token or at the limit. Tokens after the end are ignored."""
        if self.has_ended:
            return
        if token in self.asked.stop_tokens:
            self.has_ended = True
        else:
            self.tokens.append(token)
            self.has_ended = len(self.tokens) == self.asked.max_new_tokens


class Generator:
    """Answers prompts with the adapters of an engine."""

    def __init__(
        self,
        decoder: Decoder,
        adapters: Adapters,
        ops: Ops,
        max_tokens: int,
        bucket_of: Callable[[Sequence[Sequence[Span]]], BucketShape],
        on_pass: Callable[[], None],
    ) -> None:
        """
        Args:
            decoder: the base.
            adapters: the slots.
            ops: operations of the device.
            max_tokens: tokens of a pass over prompts.
            bucket_of: returns the bucket that holds each of some passes.
            on_pass: called after each pass.
        """
        self._decoder = decoder
        self._adapters = adapters
        self._ops = ops
        self._max_tokens = max_tokens
        self._bucket_of = bucket_of
        self._on_pass = on_pass
        self._device = adapters.weights.device

    def answer(self, asked: Sequence[Asked]) -> list[list[list[int]]]:
        """Return the answers to each `Asked`, token ids without their stop token, in the order of its prompts."""
        answers = [[_Answer(each, row) for row in range(len(each.prompts))] for each in asked]
        every = [answer for part in answers for answer in part]
        lengths = [int(answer.asked.prompts.lengths[answer.row]) for answer in every]
        longest = max((each.max_new_tokens for each in asked), default=0)
        for indices in batches(lengths, longest, len(every), self._max_positions()):
            group = [every[index] for index in sorted(indices)]  # sorted: by slot
            _end_stopping(group)
            if left := [answer for answer in group if not answer.has_ended]:
                self._answer_group(left)
        return [[answer.tokens for answer in part] for part in answers]

    def _max_positions(self) -> int:
        """Return how many tokens the cache may hold."""
        if self._device.type != "cuda":
            return MAX_BATCH_TOKENS
        memory = torch.cuda.get_device_properties(self._device).total_memory
        return int(memory // CACHE_SHARE // self._decoder.cache_bytes)

    def _answer_group(self, group: list[_Answer]) -> None:
        """Answer prompts whose cache exists at the same time; if memory runs out, one half after the other."""
        try:
            self._generate(group)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
        else:
            return
        torch.cuda.empty_cache()
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            for answer in half:
                answer.tokens, answer.has_ended = [], False
            self._answer_group(half)

    def _generate(self, group: list[_Answer]) -> None:
        lengths = [int(answer.asked.prompts.lengths[answer.row]) for answer in group]
        room = max(lengths) + max(answer.asked.max_new_tokens for answer in group)
        caches = self._decoder.new_cache(len(group), _rounded(room))
        tokens = self._first_tokens(group, caches)
        positions = torch.tensor(lengths, device=self._device)
        step = self._step_of(group)
        while True:
            for answer, token in zip(group, tokens.tolist(), strict=True):
                answer.add(token)
            self._on_pass()
            _end_stopping(group)
            going_on = [index for index, answer in enumerate(group) if not answer.has_ended]
            if not going_on:
                return
            if 2 * len(going_on) <= len(group):  # otherwise copying the cache costs more than the tokens that are saved
                kept = torch.tensor(going_on, device=self._device)
                group, tokens, positions = [group[index] for index in going_on], tokens[kept], positions[kept]
                for layer, cache in enumerate(caches):  # one by one: two whole caches may not fit
                    caches[layer] = cache.kept(kept)
                step = self._step_of(group)
            tokens = self._next_tokens(group, step, tokens, positions, caches)
            positions = positions + 1

    def _first_tokens(self, group: list[_Answer], caches: Sequence[LayerCache]) -> torch.Tensor:
        """Fill the caches with the prompts, and return the first token of each answer, (answers,)."""
        passes = split_into_passes(_spans(group), self._max_tokens, self._whole_tiles)
        shape, at, found = self._bucket_of(passes), 0, []
        for spans in passes:
            places, last = self._places(spans, first=at)
            at += len(last)
            inputs = self._inputs(self._filled(shape, spans), places, reads_cache=False, length=0)
            found.append(self._decoder.next_tokens(inputs, caches, last))
            self._on_pass()
        return torch.cat(found)

    def _step_of(self, group: Sequence[_Answer]) -> tuple[FlatBatch, torch.Tensor]:
        """Return the flat batch of the passes that add one token to each answer, and the places of these tokens."""
        spans = [_with_one_token(span) for span in _spans(group)]
        return self._filled(self._bucket_of([spans]), spans), self._places(spans, first=0)[1]

    def _next_tokens(
        self,
        group: Sequence[_Answer],
        step: tuple[FlatBatch, torch.Tensor],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """Compute the token after the last one of each answer: (answers,) to (answers,).

        Args:
            group: the answers, in the order of the cache.
            step: from `_step_of`. Tokens are written into its batch.
            tokens: (answers,) last tokens.
            positions: (answers,) their positions.
            caches: one for each layer.
        """
        batch, places = step
        batch.ids[places] = tokens.int()
        sequences = torch.arange(len(group), device=self._device)
        length = max(int(answer.asked.prompts.lengths[answer.row]) + len(answer.tokens) for answer in group)
        inputs = self._inputs(
            batch, CachePlaces(places, sequences, positions), reads_cache=True, length=_rounded(length)
        )
        return self._decoder.next_tokens(inputs, caches, places)

    def _inputs(self, batch: FlatBatch, places: CachePlaces, reads_cache: bool, length: int) -> CachedInputs:
        return CachedInputs(self._ops, batch, self._adapters, "nothing", places, reads_cache, length)

    def _filled(self, shape: BucketShape, spans: Sequence[Span]) -> FlatBatch:
        buffer = shape.buffer("cpu")
        shape.fill(buffer.numpy(), spans)
        return shape.view(buffer.to(self._device))

    def _places(self, spans: Sequence[Span], first: int) -> tuple[CachePlaces, torch.Tensor]:
        """Return where the tokens of a pass belong in the cache, and the last token of each sequence.

        Args:
            spans: of the pass.
            first: row of the cache for its first sequence; the others follow.
        """
        tokens, at = [], 0
        for span in spans:
            tokens.append(np.arange(at, at + span.num_tokens))
            at += self._whole_tiles(span.num_tokens)
        lengths = np.concatenate([span.rows.lengths[list(span.indices)] for span in spans])
        ends, flat = np.cumsum(lengths), np.concatenate(tokens)
        sequences = np.repeat(np.arange(first, first + len(lengths)), lengths)
        positions = np.arange(len(flat)) - np.repeat(ends - lengths, lengths)
        parts = (torch.from_numpy(part).to(self._device) for part in (flat, sequences, positions))
        return CachePlaces(*parts), torch.from_numpy(flat[ends - 1]).to(self._device)

    def _whole_tiles(self, tokens: int) -> int:
        return tokens + -tokens % self._ops.TILE


def _end_stopping(group: Sequence[_Answer]) -> None:
    """End the answers of trials that are to end now."""
    stopping = {id(asked) for asked in {id(each.asked): each.asked for each in group}.values() if asked.is_stopping()}
    for answer in group:
        answer.has_ended |= id(answer.asked) in stopping


def _rounded(length: int) -> int:
    return length + -length % LENGTH_STEP


def _spans(group: Sequence[_Answer]) -> list[Span]:
    """Return the prompts of a group, whose answers are in the order of the slots, as a span for each slot."""
    rows: dict[int, list[_Answer]] = {}
    for answer in group:
        rows.setdefault(answer.asked.slot, []).append(answer)
    return [
        Span(slot, part[0].asked.prompts, [answer.row for answer in part], part[0].asked.table | WITHOUT_DROPOUT)
        for slot, part in rows.items()
    ]


def _with_one_token(span: Span) -> Span:
    """Return a span with as many rows, of one token each."""
    count = len(span.indices)
    return Span(span.slot, TokenizedRows([[0]] * count, [[IGNORED]] * count), range(count), span.table)
