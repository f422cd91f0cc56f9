"""Slots on one base: a step for all that have a batch, as one CUDA graph a bucket where there is a GPU."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from orchestrator.record import RowScores
from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.sizes import EVALUATION_TOKENS, Recompute
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, PassInputs
from orchestrator.training.fast.step.flat_batch import BucketShape, FlatBatch, Span, TokenizedRows

# The graphs of all buckets share a pool. Segments of fixed size serve one bucket and not the next, somewhat larger one:
# after 13 buckets of 16 trials at 1.1B they held 55 GiB, where the largest step takes 27. Read when CUDA starts.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

AHEAD = 4
"""Steps that the host may be ahead of the GPU."""

CPU_TOKENS = 2048
"""Of one pass on a CPU: longer ones are no faster, and take memory."""

FINEST = 64
"""Tokens: no two buckets on a GPU are closer."""


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured, of each slot."""

    losses: list[float]
    """Weighted by the slot's `loss_weight`: the parts of a batch add up to its mean per token."""
    norms: list[float]
    """Of the whole gradient before clipping, where the slot stepped."""
    hits: list[float]
    """Tokens whose target was likeliest."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Rows that a slot's adapter is evaluated on."""

    engine: "Engine"
    slot: int
    """Of the engine."""
    rows: TokenizedRows
    table: dict[str, float]
    """The slot's values of `row.TABLE`."""


class Pending:
    """Figures on their way from the device."""

    def __init__(self, values: torch.Tensor, arrived: Any) -> None:
        """
        Args:
            values: float32 on the host; of a step (3, slots), of an evaluation (2, tokens).
            arrived: CUDA event after which they are there, or None.
        """
        self._values = values
        self._arrived = arrived

    @property
    def is_there(self) -> bool:
        """Whether reading would not wait."""
        return self._arrived is None or bool(self._arrived.query())

    def read(self) -> StepMetrics:
        """Those of a step, waiting for them if need be."""
        return StepMetrics(*self.values().tolist())

    def values(self) -> torch.Tensor:
        """All of them, waiting for them if need be."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


class Engine:
    """Steps and evaluations of all slots of one worker."""

    def __init__(self, decoder: Decoder, adapters: Adapters, recompute: Recompute, pool: Any, on_gpu: bool) -> None:
        """
        Args:
            decoder: the base.
            adapters: the slots.
            recompute: what the backward computes again.
            pool: memory of captured graphs, shared by engines that never step at once; None steps without graphs.
            on_gpu: whether it is for a GPU. Kernels for one can be compiled where base and adapters are not on it.
        """
        self.adapters = adapters
        self._decoder = decoder
        self._recompute = recompute
        self._on_gpu = on_gpu
        self._ops = _kernels() if self._on_gpu else reference
        self.max_tokens = CPU_TOKENS
        """Of one pass: a larger batch takes several."""
        self._pool = pool
        self._probed = 0, 0
        self.peak_bytes: int | None = None
        """GPU memory at the peak of the probe: what the graphs' pool keeps from then on, and what stands."""
        self._buckets: dict[tuple[BucketShape, bool], _Bucket] = {}

    def step(self, spans: Sequence[Span]) -> Pending:
        """Forward, backward and, where a slot's batch ends here, its update. Returns without waiting for the device.

        Args:
            spans: what each slot trains on, at most one a slot.
        """
        # Tokens in the order of slots: kernels that go by slots then read side by side what lies side by side.
        spans = sorted(spans, key=lambda span: span.slot)
        return self._run(spans, self._layout([spans]), trains=True)

    def probe(self, tokens: int, evaluation_tokens: int) -> None:
        """Run an empty step and an empty evaluation of these sizes, unless larger ones have run.

        Memory is then known to suffice, and kernels are loaded, which no capture could do.

        Raises:
            torch.OutOfMemoryError: it does not.
        """
        if tokens <= self._probed[0] and evaluation_tokens <= self._probed[1]:
            return
        torch.cuda.reset_peak_memory_stats()
        self.compile(tokens, evaluation_tokens)
        for layout, trains in self._empty(tokens, evaluation_tokens):
            bucket = _Bucket(layout, self.adapters.weights.device)
            bucket.bring([])
            bucket.send(self._compute(bucket.row, trains)).values()
        self._probed = max(tokens, self._probed[0]), max(evaluation_tokens, self._probed[1])
        self.peak_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()  # for the graphs' pool

    def compile(self, tokens: int, evaluation_tokens: int) -> None:
        """Have the kernels of such a step and evaluation compiled, all at once: in turn takes four times as long."""
        with self._ops.compiled_together():
            for layout, trains in self._empty(tokens, evaluation_tokens):
                self._compute(layout.row(layout.buffer(self.adapters.weights.device)), trains)

    def _empty(self, tokens: int, evaluation_tokens: int) -> list[tuple[BucketShape, bool]]:
        """Layouts of a step and an evaluation, and which of them trains."""
        sizes = ((tokens, True), (evaluation_tokens, False))
        return [(self._bucket(size, -(-size // self._decoder.longest)), trains) for size, trains in sizes]

    def evaluate(self, asked: Sequence[EvaluationBatch]) -> list[RowScores]:
        """Of each slot: losses and hits of each row, without dropout.

        Args:
            asked: at most one a slot. Their rows are laid one after another into passes that are alike.
        """
        most = EVALUATION_TOKENS if self._on_gpu else CPU_TOKENS
        total = sum(self.whole_tiles(int(held.rows.lengths.sum())) for held in asked)
        even = -(-total // -(-total // most))
        max_tokens = min(most, even + max(held.rows.longest for held in asked))
        passes: list[list[Span]] = [[]]
        left = max_tokens
        for held in asked:
            table = held.table | {"threshold": 0, "keep_scale": 1.0, "applies": 0, "loss_weight": 1.0}
            rows, at = held.rows, 0
            while at < len(rows):
                fits = rows.fitting(range(at, len(rows)), left)
                if not fits and passes[-1]:
                    passes.append([])
                    left = max_tokens
                    continue
                span = Span(held.slot, rows, range(at, at + max(fits, 1)), table)  # the longest row may stand alone
                passes[-1].append(span)
                left -= self.whole_tiles(span.num_tokens)
                at += len(span.indices)
        layout = self._layout(passes)
        sums: dict[int, list[Any]] = {held.slot: [] for held in asked}
        for spans, pending in zip(passes, [self._run(spans, layout, trains=False) for spans in passes], strict=True):
            self._sum_by_row(spans, pending.values().numpy(), sums)
        measured = []
        for held in asked:
            losses, hits = np.concatenate(sums[held.slot], axis=1).tolist()
            tokens = held.rows.num_targets_of_each.tolist()
            measured.append(RowScores(losses=losses, hits=[round(each) for each in hits], tokens=tokens))
        return measured

    def _sum_by_row(self, spans: Sequence[Span], values: Any, sums: dict[int, list[Any]]) -> None:
        """Add to each slot's `sums` the (2, rows) losses and hits of its rows in this pass."""
        at = 0
        for span in spans:
            lengths = span.rows.lengths[list(span.indices)]
            end = at + int(lengths.sum())
            starts = np.cumsum(lengths) - lengths
            sums[span.slot].append(np.add.reduceat(values[:, at:end].astype(np.float64), starts, axis=1))
            at += self.whole_tiles(end - at)

    def whole_tiles(self, tokens: int) -> int:
        """What so many tokens of a slot take of a row."""
        return tokens + -tokens % int(self._ops.TILE)

    def _layout(self, steps: Sequence[Sequence[Span]]) -> BucketShape:
        """The smallest bucket that holds each of these steps."""
        tokens = max(sum(self.whole_tiles(span.num_tokens) for span in spans) for spans in steps)
        return self._bucket(tokens, max(sum(span.most_sequences for span in spans) for spans in steps))

    def _bucket(self, tokens: int, sequences: int) -> BucketShape:
        tile, longest = self._ops.TILE, self._decoder.longest
        apart = max(FINEST, 1 << max(0, tokens.bit_length() - 5)) if self._on_gpu else tile
        tokens += -tokens % apart
        sequences += -(-tokens // longest)  # as many as the rest of the bucket may need
        return BucketShape(tokens, sequences + -sequences % 8, self.adapters.num_slots, tile, longest)

    def _run(self, spans: Sequence[Span], layout: BucketShape, trains: bool) -> Pending:
        if not self._on_gpu:
            buffer = layout.buffer("cpu")
            layout.fill(buffer.numpy(), spans)
            return Pending(self._compute(layout.row(buffer), trains), None)
        bucket = self._buckets.get((layout, trains))
        if bucket is None:
            bucket = self._buckets[layout, trains] = _Bucket(layout, self.adapters.weights.device)
        bucket.bring(spans)
        if self._pool is None:
            return bucket.send(self._compute(bucket.row, trains))
        if bucket.graph is None:
            with suppress(torch.OutOfMemoryError):
                bucket.graph, bucket.values = self._capture(bucket.row, trains)
        if bucket.graph is None:  # once more, with what torch keeps in reserve, for which it waits
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            bucket.graph, bucket.values = self._capture(bucket.row, trains)
        bucket.graph.replay()
        return bucket.send(bucket.values)

    def _capture(self, row: FlatBatch, trains: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Capture a step while the device works on: `torch.cuda.graph` would wait for it."""
        torch.cuda.current_blas_handle()  # each thread has its own, which no capture may create
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_capture_stream()):
            # Another thread may set a trial up meanwhile: what it allocates is none of the capture's business.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                values = self._compute(row, trains)
            finally:
                graph.capture_end()
        return graph, values

    def _compute(self, row: FlatBatch, trains: bool) -> torch.Tensor:
        """A step's (3, slots) losses, norms, hits; an evaluation's (2, tokens) losses, hits."""
        ops, slots = self._ops, self.adapters.num_slots
        step = PassInputs(ops, row, self.adapters, self._recompute)
        if not trains:
            return torch.stack(self._decoder.evaluate(step))
        losses, hits = self._decoder.train(step)
        norms = ops.update(self.adapters, row)
        sums = ops.sum_by_slot(losses, row, slots) * row.table["loss_weight"]
        return torch.stack((sums, norms, ops.sum_by_slot(hits, row, slots)))


class _Bucket:
    """Buffers of one layout on the GPU, and its graph."""

    def __init__(self, layout: BucketShape, device: torch.device) -> None:
        self._layout = layout
        self._buffer = layout.buffer(device)
        self.row = layout.row(self._buffer)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.values = torch.empty(0)

    # Pinned memory is taken anew each time: torch's allocator gives none back that a copy still reads or writes.

    def bring(self, spans: Sequence[Span]) -> None:
        """Send a step's input to the device."""
        staging = self._layout.buffer("cpu", pinned=True)
        self._layout.fill(staging.numpy(), spans)
        self._buffer.copy_(staging, non_blocking=True)

    def send(self, values: torch.Tensor) -> Pending:
        """Send a step's figures to the host."""
        result = torch.empty(values.shape, pin_memory=True)
        result.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Pending(result, arrived)


@cache
def _capture_stream() -> Any:
    return torch.cuda.Stream()


def _kernels() -> Any:
    from orchestrator.training.fast.ops.triton import norm_swiglu_ce

    return norm_swiglu_ce
