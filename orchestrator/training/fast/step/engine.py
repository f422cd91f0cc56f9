"""Steps and evaluations of all slots on one base. On a GPU each bucket has one CUDA graph.

    spans -> BucketShape -> host buffer -> device buffer -> graph of (decoder, update) -> results -> Pending

The host does not wait for the device: it sends the next steps and reads the results of a step later.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from orchestrator.imports import use_expandable_segments
from orchestrator.record import RowScores
from orchestrator.training.fast.ops.protocol import ops_for
from orchestrator.training.fast.sizes import EVALUATION_TOKENS, Recompute
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.experts import Experts
from orchestrator.training.fast.step.flat_batch import (
    WITHOUT_DROPOUT,
    BucketShape,
    FlatBatch,
    Span,
    TokenizedRows,
    split_into_passes,
)
from orchestrator.training.fast.step.generation import Asked, Generator
from orchestrator.training.fast.step.pass_inputs import PassInputs

# At import: torch reads the setting when CUDA starts.
use_expandable_segments()

AHEAD = 4
"""Steps that the host may be ahead of the GPU."""

CPU_TOKENS = 2048
"""Largest pass on a CPU, in tokens. Longer ones are no faster, and take memory."""

FINEST = 64
"""Smallest difference between two buckets on a GPU, in tokens."""


@dataclass(frozen=True)
class StepMetrics:
    """The measurements of a step, one value for each slot."""

    losses: list[float]
    """Sum of the token losses in nats, times the slot's `loss_weight`. The passes of a batch add up to its mean."""
    norms: list[float]
    """Norm of the whole gradient before clipping; defined where the slot's optimizer stepped."""
    hits: list[float]
    """Number of tokens whose target was the likeliest."""


@dataclass(frozen=True)
class EvaluationBatch:
    """The rows on which a slot's adapter is evaluated."""

    engine: "Engine"
    slot: int
    rows: TokenizedRows
    table: dict[str, float]
    """The slot's values of `flat_batch.TABLE`."""


@dataclass(frozen=True)
class GenerationBatch:
    """The prompts that a slot's adapter answers."""

    engine: "Engine"
    asked: Asked


class Pending:
    """Results on their way from the device."""

    def __init__(self, values: torch.Tensor, arrived: Any) -> None:
        """Hold results that may not have arrived yet.

        Args:
            values: float32 on the host; (3, S) of a step, (2, T) of an evaluation.
            arrived: CUDA event after which the values are complete, or None where they already are.
        """
        self._values = values
        self._arrived = arrived

    @property
    def is_ready(self) -> bool:
        """True where reading would not wait."""
        return self._arrived is None or bool(self._arrived.query())

    def read(self) -> StepMetrics:
        """Return the results of a step; wait for them if necessary."""
        return StepMetrics(*self.values().tolist())

    def values(self) -> torch.Tensor:
        """Return all results; wait for them if necessary."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


class Engine:
    """Steps and evaluations of all slots that share one base and one set of stacked adapters."""

    def __init__(self, decoder: Decoder, adapters: Adapters, recompute: Recompute, pool: Any, on_gpu: bool) -> None:
        """Prepare an engine; nothing runs yet.

        Args:
            decoder: the base.
            adapters: the slots.
            recompute: what the backward computes again.
            pool: memory pool of captured graphs, shared by engines that never step at once; None steps without graphs.
            on_gpu: whether to use the GPU's kernels. They can be compiled while base and adapters lie on the CPU.
        """
        self.adapters = adapters
        self._decoder = decoder
        self._recompute = recompute
        self._on_gpu = on_gpu
        self._ops = ops_for(on_gpu)
        self.max_tokens = CPU_TOKENS
        """Largest pass in tokens. A larger batch takes several passes."""
        self._pool = pool
        self._probed = 0, 0
        self.peak_bytes: int | None = None
        """GPU memory at the peak of the probe, which the graphs' pool keeps from then on, with all that is loaded."""
        self._buckets: dict[tuple[BucketShape, bool], _Bucket] = {}

    @property
    def experts(self) -> dict[int, Experts]:
        """Experts of the base, as in `Decoder.experts`."""
        return self._decoder.experts

    def with_one_slot_on(self, model: Any) -> "Engine":
        """Return an engine that computes the same with one slot on another model, whose layers are some of this one's.

        Args:
            model: a whole base.
        """
        own = self.adapters
        names = {name.rpartition(".")[0] for name, _ in own.matrices(0, own.rank, own.weights)}
        layers, device, eight_bit = adapted_layers(model, names), own.weights.device, own.eight_bit is not None
        adapters = Adapters(layers, 1, own.rank, own.weights.dtype, own.compute_dtype, device, eight_bit)
        decoder = Decoder(model, self._decoder.dtype, self._decoder.longest, keeps_base=False)
        return Engine(decoder, adapters, self._recompute, None, self._on_gpu)

    def step(self, spans: Sequence[Span]) -> Pending:
        """Make forward, backward and, where a slot's batch ends here, its update. Does not wait for the device.

        Args:
            spans: what each slot trains on, at most one for each.
        """
        # In the order of slots: kernels that go slot by slot then read neighboring memory.
        spans = sorted(spans, key=lambda span: span.slot)
        return self._run(spans, self._bucket_shape([spans]), trains=True)

    def step_once(self, span: Span) -> StepMetrics:
        """Make a step without a CUDA graph, for a batch of a size that does not come again."""
        shape = self._bucket_shape([[span]])
        run = self._run_once if self._on_gpu else self._run
        return run([span], shape, True).read()

    def probe(self, tokens: int, evaluation_tokens: int) -> None:
        """Run an empty step and an empty evaluation of these sizes, unless larger ones have run.

        It shows that memory suffices, and loads the kernels, which must not happen during a capture.

        Args:
            tokens: of the step.
            evaluation_tokens: of the evaluation.

        Raises:
            torch.OutOfMemoryError: memory does not suffice.
        """
        if tokens <= self._probed[0] and evaluation_tokens <= self._probed[1]:
            return
        torch.cuda.reset_peak_memory_stats()
        self.compile(tokens, evaluation_tokens)
        for shape, trains in self._probe_shapes(tokens, evaluation_tokens):
            self._run_once([], shape, trains).values()
        self._probed = max(tokens, self._probed[0]), max(evaluation_tokens, self._probed[1])
        self.peak_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()  # leaves the memory to the graphs' pool

    def compile(self, tokens: int, evaluation_tokens: int) -> None:
        """Compile the kernels of such a step and evaluation, all at once: one by one takes four times as long.

        Args:
            tokens: of the step.
            evaluation_tokens: of the evaluation.
        """
        from orchestrator.training.fast.ops.triton.launch import compiled_together

        with compiled_together():
            for shape, trains in self._probe_shapes(tokens, evaluation_tokens):
                self._compute(shape.view(shape.buffer(self.adapters.weights.device)), trains)

    def _probe_shapes(self, tokens: int, evaluation_tokens: int) -> list[tuple[BucketShape, bool]]:
        """Return the buckets of a step and an evaluation, and which of them trains."""
        sizes = ((tokens, True), (evaluation_tokens, False))
        return [(self._bucket_of(size, size, -(-size // self._decoder.longest)), trains) for size, trains in sizes]

    def evaluate(
        self, evaluations: Sequence[EvaluationBatch], on_pass: Callable[[], None] = lambda: None
    ) -> list[RowScores]:
        """Measure losses and hits of each row, without dropout.

        Args:
            evaluations: at most one for each slot. Their rows fill passes of one bucket, one after another.
            on_pass: called after each pass has been sent, and after its values have arrived.

        Returns:
            The scores of each evaluation, in the same order.
        """
        limit = EVALUATION_TOKENS if self._on_gpu else CPU_TOKENS
        total = sum(self.whole_tiles(int(evaluation.rows.lengths.sum())) for evaluation in evaluations)
        even = -(-total // -(-total // limit))
        max_tokens = min(limit, even + max(evaluation.rows.longest for evaluation in evaluations))
        whole = [
            Span(each.slot, each.rows, range(len(each.rows)), each.table | WITHOUT_DROPOUT) for each in evaluations
        ]
        passes = split_into_passes(whole, max_tokens, self.whole_tiles)
        shape = self._bucket_shape(passes)
        sums: dict[int, list[Any]] = {evaluation.slot: [] for evaluation in evaluations}
        sent = []
        for spans in passes:
            sent.append(self._run(spans, shape, trains=False))
            on_pass()
        for spans, pending in zip(passes, sent, strict=True):
            self._sum_by_row(spans, pending.values().numpy(), sums)
            on_pass()
        measured = []
        for evaluation in evaluations:
            losses, hits = np.concatenate(sums[evaluation.slot], axis=1).tolist()
            tokens = evaluation.rows.num_targets_per_row.tolist()
            measured.append(RowScores(losses=losses, hits=[round(each) for each in hits], tokens=tokens))
        return measured

    def generate(
        self, batches: Sequence[GenerationBatch], on_pass: Callable[[], None] = lambda: None
    ) -> list[list[list[int]]]:
        """Answer prompts greedily, those of all slots together.

        Args:
            batches: at most one for each slot.
            on_pass: called after each pass.

        Returns:
            For each batch the token ids of its answers, without their stop tokens, in the order of its prompts.
        """
        limit = EVALUATION_TOKENS if self._on_gpu else CPU_TOKENS
        generator = Generator(self._decoder, self.adapters, self._ops, limit, self._bucket_shape, on_pass)
        return generator.answer([batch.asked for batch in batches])

    def _sum_by_row(self, spans: Sequence[Span], values: Any, sums: dict[int, list[Any]]) -> None:
        """Append to each slot's `sums` the (2, rows) losses and hits of its rows in this pass.

        Args:
            spans: of the pass.
            values: (2, T) losses and hits of its tokens.
            sums: by slot.
        """
        at = 0
        for span in spans:
            lengths = span.rows.lengths[list(span.indices)]
            end = at + int(lengths.sum())
            starts = np.cumsum(lengths) - lengths
            sums[span.slot].append(np.add.reduceat(values[:, at:end].astype(np.float64), starts, axis=1))
            at += self.whole_tiles(end - at)

    def whole_tiles(self, tokens: int) -> int:
        """Round the tokens of a span up to whole tiles."""
        return tokens + -tokens % self._ops.TILE

    def _bucket_shape(self, passes: Sequence[Sequence[Span]]) -> BucketShape:
        """Return the smallest bucket that holds each of these passes."""
        tokens, targets, sequences = (
            max(sum(map(count, spans)) for spans in passes)
            for count in (
                lambda span: self.whole_tiles(span.num_tokens),
                lambda span: span.num_targets,
                lambda span: span.max_sequences,
            )
        )
        return self._bucket_of(tokens, targets, sequences)

    def _bucket_of(self, tokens: int, targets: int, sequences: int) -> BucketShape:
        """Round tokens, tokens with a loss, and sequences up to those of a bucket."""
        tile, longest = self._ops.TILE, self._decoder.longest
        # On a GPU: multiples of 64 up to 2,048 tokens, then 16 buckets for each doubling.
        distance = max(FINEST, 1 << max(0, tokens.bit_length() - 5)) if self._on_gpu else tile
        tokens += -tokens % distance
        sequences += -(-tokens // longest)  # as many as the padding of the bucket may need
        # In quarters, so that most passes of as many tokens share a graph.
        quarter = -(-tokens // 4) if self._on_gpu else tile
        max_targets = min(tokens, max(1, -(-targets // quarter)) * quarter)
        return BucketShape(tokens, max_targets, sequences + -sequences % 8, self.adapters.num_slots, tile, longest)

    def _run(self, spans: Sequence[Span], shape: BucketShape, trains: bool) -> Pending:
        """Make one pass in a bucket: on a GPU by its graph, which is captured at the first use."""
        if not self._on_gpu:
            buffer = shape.buffer("cpu")
            shape.fill(buffer.numpy(), spans)
            return Pending(self._compute(shape.view(buffer), trains), None)
        bucket = self._buckets.get((shape, trains))
        if bucket is None:
            bucket = self._buckets[shape, trains] = _Bucket(shape, self.adapters.weights.device)
        bucket.upload(spans)
        if self._pool is None:
            return bucket.download(self._compute(bucket.batch, trains))
        if bucket.graph is None:
            with suppress(torch.OutOfMemoryError):
                bucket.graph, bucket.values = self._capture(bucket.batch, trains)
        if bucket.graph is None:  # again, with the memory that torch holds in reserve; freeing it waits for the device
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            if not any(each.graph for each in self._buckets.values()):
                # torch 2.11 refuses a pool whose only capture has failed (INTERNAL ASSERT in CachingHostAllocator.h).
                self._pool = torch.cuda.graph_pool_handle()
            bucket.graph, bucket.values = self._capture(bucket.batch, trains)
        bucket.graph.replay()
        return bucket.download(bucket.values)

    def _run_once(self, spans: Sequence[Span], shape: BucketShape, trains: bool) -> Pending:
        """Make one pass on a GPU in a bucket that is not kept."""
        bucket = _Bucket(shape, self.adapters.weights.device)
        bucket.upload(spans)
        return bucket.download(self._compute(bucket.batch, trains))

    def _capture(self, batch: FlatBatch, trains: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Capture a pass while the device works on. `torch.cuda.graph` would wait for the device first."""
        torch.cuda.current_blas_handle()  # each thread has its own, and a capture must not create it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_capture_stream()):
            # Thread-local, because another thread may set a trial up meanwhile and allocate memory.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                values = self._compute(batch, trains)
            finally:
                graph.capture_end()
        return graph, values

    def _compute(self, batch: FlatBatch, trains: bool) -> torch.Tensor:
        """Return losses, norms and hits of a step, (3, S), or losses and hits of an evaluation, (2, T)."""
        ops, num_slots = self._ops, self.adapters.num_slots
        inputs = PassInputs(ops, batch, self.adapters, self._recompute)
        if not trains:
            return torch.stack(self._decoder.evaluate(inputs))
        losses, hits = self._decoder.train(inputs)
        norms = ops.update(self.adapters, batch)
        sums = ops.sum_by_slot(losses, batch, num_slots) * batch.table["loss_weight"]
        return torch.stack((sums, norms, ops.sum_by_slot(hits, batch, num_slots)))


class _Bucket:
    """The buffers of one bucket on the GPU, and its graph."""

    def __init__(self, shape: BucketShape, device: torch.device) -> None:
        self._shape = shape
        self._buffer = shape.buffer(device)
        self.batch = shape.view(self._buffer)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.values = torch.empty(0)
        """Results of the graph's last replay."""

    # Both methods allocate pinned memory anew each time. torch's allocator gives no block out again while a copy still
    # reads or writes it.

    def upload(self, spans: Sequence[Span]) -> None:
        """Send the input of a pass to the device."""
        staging = self._shape.buffer("cpu", pinned=True)
        self._shape.fill(staging.numpy(), spans)
        self._buffer.copy_(staging, non_blocking=True)

    def download(self, values: torch.Tensor) -> Pending:
        """Send the results of a pass to the host."""
        result = torch.empty(values.shape, pin_memory=True)
        result.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Pending(result, arrived)


@cache
def _capture_stream() -> Any:
    return torch.cuda.Stream()
