"""Several slots in one step, and one batch in several passes: each slot has the same numbers as alone."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.record import RowScores
from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.drive.multi_lora import Batch, MultiLora, TrialSteps
from orchestrator.training.fast.drive.slot import dropout_key
from orchestrator.training.fast.step import engine as engine_module
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch, StepMetrics
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows
from orchestrator.training.model.targets import expected_modules

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]

LENGTHS = (9, 4, 17, 8, 1, 12, 6, 15)
STEPS = 6


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


@dataclass(frozen=True)
class Trial:
    """Batches and hyperparameters of one slot."""

    rank: int
    batch: int
    steps: Sequence[int]
    """Steps of the engine in which it has a batch."""
    learning_rate: float = 1e-3
    dropout: float = 0.0
    alpha: float = 16.0
    decay: float = 0.0
    max_norm: float = math.inf
    seed: int = 0


TRIALS = {
    3: Trial(rank=4, batch=2, steps=range(STEPS), dropout=0.1, alpha=8, seed=1),
    0: Trial(rank=16, batch=1, steps=(0, 2, 3, 5), learning_rate=5e-3, decay=0.1, seed=2),
    2: Trial(rank=8, batch=5, steps=range(STEPS), dropout=0.4, alpha=2, max_norm=0.01, seed=3),
}


def make_engine(model: Any, num_slots: int, rank: int, longest: int = max(LENGTHS)) -> Engine:
    modules = expected_modules(model, LoraSection())
    adapters = Adapters(
        adapted_layers(model, modules), num_slots, rank, torch.float32, torch.float32, torch.device("cpu")
    )
    return Engine(Decoder(model, torch.float32, longest, keeps_base=True), adapters, "nothing", None, on_gpu=False)


def assert_same(scores: RowScores, expected: RowScores) -> None:
    assert scores.losses == pytest.approx(expected.losses, rel=1e-6, abs=1e-5)
    assert (scores.hits, scores.tokens) == (expected.hits, expected.tokens)


def start(engine: Engine, slot: int, trial: Trial) -> None:
    generator = torch.Generator().manual_seed(trial.seed)
    for _, matrix in engine.adapters.matrices(slot, trial.rank, engine.adapters.weights):
        matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))


def weights(engine: Engine, slot: int, rank: int) -> torch.Tensor:
    matrices = engine.adapters.matrices(slot, rank, engine.adapters.weights)
    return torch.cat([matrix.flatten() for _, matrix in matrices])


@pytest.fixture
def span(make_rows: MakeRows, make_table: MakeTable) -> Callable[[int, Trial, int], Span]:
    """`span(slot, trial, step)` returns the trial's batch at a step."""

    def make(slot: int, trial: Trial, step: int) -> Span:
        rows = make_rows(*LENGTHS, seed=trial.seed)
        done = [s for s in trial.steps if s <= step]
        indices = [(len(done) * 3 + i) % len(rows) for i in range(trial.batch)]
        table = make_table(
            trial.dropout,
            step=len(done),
            key=dropout_key(trial.seed, len(done)),
            scale=trial.alpha / trial.rank,
            loss_weight=1 / max(1, rows.num_targets(indices)),
            learning_rate=trial.learning_rate,
            weight_decay=trial.decay,
            max_norm=trial.max_norm,
        )
        return Span(slot, rows, indices, table)

    return make


def test_a_slot_has_the_same_numbers_as_alone(
    model: Any, span: Callable[[int, Trial, int], Span], make_rows: MakeRows, make_table: MakeTable
) -> None:
    """Train slots of different ranks, rates, dropouts and batches; one is idle throughout, one now and then."""
    idle, held_out = 1, make_rows(*LENGTHS, seed=9)
    together = make_engine(model, 4, 16)
    for slot, trial in TRIALS.items():
        start(together, slot, trial)
    flats = together.adapters.weights, together.adapters.moment1, together.adapters.moment2
    for flat in flats:
        flat[idle].uniform_(0.1, 1.0)
    before = [flat[idle].clone() for flat in flats]
    metrics: list[StepMetrics] = []
    starts = {slot: weights(together, slot, trial.rank).clone() for slot, trial in TRIALS.items()}
    for step in range(STEPS):
        spans = [span(slot, trial, step) for slot, trial in TRIALS.items() if step in trial.steps]
        metrics.append(together.step(spans).read())
    for flat, was in zip(flats, before, strict=True):
        assert torch.equal(flat[idle], was), "an idle slot has changed"

    for slot, trial in TRIALS.items():
        alone = make_engine(model, 1, trial.rank)
        start(alone, 0, trial)
        for step in trial.steps:
            expected, found = alone.step([span(0, trial, step)]).read(), metrics[step]
            assert found.losses[slot] == pytest.approx(expected.losses[0], abs=2e-6)
            assert found.norms[slot] == pytest.approx(expected.norms[0], rel=1e-5)
            assert found.hits[slot] == expected.hits[0]
        update = weights(alone, 0, trial.rank) - starts[slot]
        difference = weights(together, slot, trial.rank) - weights(alone, 0, trial.rank)
        assert difference.norm() <= 1e-4 * update.norm(), f"slot {slot}"
        evaluation = EvaluationBatch(
            together, slot, held_out, make_table(trial.dropout, scale=trial.alpha / trial.rank)
        )
        (scores,) = together.evaluate([evaluation])
        (expected_scores,) = alone.evaluate(
            [EvaluationBatch(alone, 0, held_out, make_table(scale=trial.alpha / trial.rank))]
        )
        assert_same(scores, expected_scores)


def test_a_slot_that_diverges_does_not_change_other_slots(model: Any, span: Callable[[int, Trial, int], Span]) -> None:
    sick = Trial(rank=8, batch=2, steps=range(STEPS), learning_rate=1e30, seed=4)
    results = []
    for trials in (TRIALS, TRIALS | {1: sick}):
        engine = make_engine(model, 4, 16)
        for slot, trial in trials.items():
            start(engine, slot, trial)
        metrics = []
        for step in range(STEPS):
            spans = [span(slot, trial, step) for slot, trial in reversed(trials.items()) if step in trial.steps]
            metrics.append(engine.step(spans).read())
        results.append((engine, metrics))
    (healthy, expected), (mixed, found) = results
    assert math.isfinite(found[0].losses[1])
    assert not any(math.isfinite(each.losses[1]) and math.isfinite(each.norms[1]) for each in found[1:]), (
        "the trial must diverge for this test"
    )
    for slot in TRIALS:
        for step in TRIALS[slot].steps:
            assert found[step].losses[slot] == pytest.approx(expected[step].losses[slot], abs=2e-6)
        one, other = (weights(engine, slot, TRIALS[slot].rank) for engine in (healthy, mixed))
        assert (one - other).norm() <= 1e-6 * one.norm()


@pytest.mark.parametrize("max_tokens", [17, 30])
def test_a_batch_in_several_passes_is_one_step(
    model: Any, make_rows: MakeRows, make_table: MakeTable, max_tokens: int
) -> None:
    """Split a batch by `MultiLora`: losses and gradients add up, masks continue, the weights change once at the end."""
    rows, trial = make_rows(*LENGTHS), Trial(rank=8, batch=8, steps=())
    table = make_table(0.3, loss_weight=1 / rows.num_targets(range(8)), weight_decay=0.1, max_norm=0.1)
    order = [3, 0, 7, 4, 1, 5, 2, 6]
    whole, parts = make_engine(model, 1, 8), make_engine(model, 1, 8)
    for engine in (whole, parts):
        start(engine, 0, trial)
    began = weights(whole, 0, 8).clone()
    expected = whole.step([Span(0, rows, order, table)]).read()
    parts.max_tokens = max_tokens
    multi_lora, found = MultiLora(), []

    def work() -> TrialSteps:
        found.extend(pending.read() for pending in (yield Batch(parts, 0, rows, order, table)))

    multi_lora.join(work())
    passes = 0
    while len(multi_lora):
        assert torch.equal(weights(parts, 0, 8), began)
        multi_lora.turn()
        passes += 1
    assert len(found) == passes > 2
    assert sum(each.losses[0] for each in found) == pytest.approx(expected.losses[0], abs=2e-6)
    assert sum(each.hits[0] for each in found) == expected.hits[0]
    assert found[-1].norms[0] == pytest.approx(expected.norms[0], rel=1e-5)
    update, difference = weights(whole, 0, 8) - began, weights(parts, 0, 8) - weights(whole, 0, 8)
    assert difference.norm() <= 1e-4 * update.norm()


def test_an_evaluation_does_not_depend_on_how_it_is_split(
    model: Any, make_rows: MakeRows, make_table: MakeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, engine = make_rows(*LENGTHS), make_engine(model, 1, 8)
    start(engine, 0, Trial(rank=8, batch=1, steps=()))
    before = [flat.clone() for flat in (engine.adapters.weights, engine.adapters.gradients, engine.adapters.moment1)]

    def evaluate(rows: TokenizedRows, dropout: float = 0.0) -> RowScores:
        (scores,) = engine.evaluate([EvaluationBatch(engine, 0, rows, make_table(dropout))])
        return scores

    values = [evaluate(rows, dropout) for dropout in (0.0, 0.5)]
    for most in (40, 17, 1):
        monkeypatch.setattr("orchestrator.training.fast.step.engine.CPU_TOKENS", most)
        values.append(evaluate(rows))
    each = [evaluate(TokenizedRows([rows.ids(i)], [[-100, *rows.targets(i)[:-1]]])) for i in range(len(rows))]
    one_by_one = RowScores(
        losses=[scores.losses[0] for scores in each],
        hits=[scores.hits[0] for scores in each],
        tokens=[rows.num_targets([i]) for i in range(len(rows))],
    )
    for scores in values:
        assert_same(scores, one_by_one)
    after = engine.adapters.weights, engine.adapters.gradients, engine.adapters.moment1
    assert all(map(torch.equal, after, before)), "an evaluation must not train"


@pytest.mark.parametrize("most", [2048, 100, 33, 1])
def test_an_evaluation_of_several_slots_measures_each_as_if_alone(
    model: Any, make_rows: MakeRows, make_table: MakeTable, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Evaluate slots with different rows, scales and ranks in shared passes, beside a slot of NaN; nothing trains."""
    monkeypatch.setattr("orchestrator.training.fast.step.engine.CPU_TOKENS", most)
    together = make_engine(model, 4, 16)
    together.adapters.weights[1] = math.nan
    rows_of_slot = {3: make_rows(*LENGTHS, seed=1), 0: make_rows(*LENGTHS[3:], seed=2), 2: make_rows(5, 16, 2, seed=3)}
    evaluations, expected = [], []
    for slot, rows in rows_of_slot.items():
        trial = TRIALS[slot]
        start(together, slot, trial)
        table = make_table(trial.dropout, scale=trial.alpha / trial.rank)
        evaluations.append(EvaluationBatch(together, slot, rows, table))
        alone = make_engine(model, 1, trial.rank)
        start(alone, 0, trial)
        expected.extend(alone.evaluate([EvaluationBatch(alone, 0, rows, table)]))
    before = [flat.clone() for flat in (together.adapters.weights[[0, 2, 3]], together.adapters.gradients)]
    measured = together.evaluate(evaluations)
    for scores, expected_scores in zip(measured, expected, strict=True):
        assert_same(scores, expected_scores)
    assert len({scores.loss for scores in measured}) == 3
    assert all(map(torch.equal, (together.adapters.weights[[0, 2, 3]], together.adapters.gradients), before))


def test_packed_sequences_have_the_same_losses_as_separate_rows(
    model: Any, make_rows: MakeRows, make_table: MakeTable
) -> None:
    """Compare each token's loss; and a step on packed rows with a step on the rows themselves."""
    rows, engine = make_rows(*LENGTHS), make_engine(model, 1, 8, longest=40)
    parts = [[0, 3], [1, 4, 5, 6], [2], [7]]
    ids = [[int(i) for part in row for i in rows.ids(part)] for row in parts]
    labels = [[int(i) for part in row for i in (-100, *rows.targets(part)[:-1])] for row in parts]
    packed = TokenizedRows(ids, labels, [[LENGTHS[part] for part in row] for row in parts])
    joined = TokenizedRows(ids, labels)
    start(engine, 0, Trial(rank=8, batch=1, steps=()))

    def losses(rows: TokenizedRows) -> Any:
        span = Span(0, rows, range(len(rows)), make_table(0.0, applies=0, loss_weight=1.0))
        values = engine._run([span], engine._bucket_shape([[span]]), trains=False).values()[0, : span.num_tokens]
        return values.numpy()

    alone = np.split(losses(rows), np.cumsum(LENGTHS)[:-1])
    expected = np.concatenate([alone[part] for row in parts for part in row])
    np.testing.assert_allclose(losses(packed), expected, atol=2e-6)
    assert np.abs(losses(joined) - expected).max() > 1e-2, "the test must notice sequences that attend to each other"
    (scores,) = engine.evaluate([EvaluationBatch(engine, 0, packed, make_table())])
    assert scores.tokens == [sum(rows.num_targets([part]) for part in row) for row in parts]
    assert scores.losses == pytest.approx([sum(float(alone[part].sum()) for part in row) for row in parts], abs=1e-4)

    after = []
    for given in (rows, packed):
        engine.adapters.clear(0)
        start(engine, 0, Trial(rank=8, batch=1, steps=()))
        num_targets = rows.num_targets(range(len(rows)))
        span = Span(0, given, range(len(given)), make_table(0.0, loss_weight=1 / num_targets, scale=2.0, rank=8))
        metrics = engine.step([span]).read()
        after.append((metrics.losses[0], metrics.norms[0], weights(engine, 0, 8)))
    assert after[1][:2] == pytest.approx(after[0][:2], rel=1e-5)
    # Adam's first step changes each weight by about the learning rate.
    torch.testing.assert_close(after[1][2], after[0][2], atol=2e-5, rtol=0)


class FakeBucket:
    """Replaces `_Bucket`, without a GPU."""

    def __init__(self, shape: Any, device: Any) -> None:
        self.batch, self.graph, self.values = None, None, None

    def upload(self, spans: Any) -> None:
        pass

    def download(self, values: Any) -> Any:
        return values


def test_a_capture_that_runs_out_of_memory_is_repeated_after_its_memory_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Any] = []
    steps: list[str] = []

    def capture(*_: Any) -> Any:
        if held:
            assert held[0]() is None
            return SimpleNamespace(replay=lambda: steps.append("replay")), "values"
        graph = set()  # type: ignore[var-annotated]
        held.append(weakref.ref(graph))
        raise torch.OutOfMemoryError("too large")

    def empty() -> None:
        assert held[0]() is None
        steps.append("empty")

    monkeypatch.setattr(engine_module, "_Bucket", FakeBucket)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "another pool")
    fake: Any = object.__new__(Engine)
    fake._on_gpu, fake._buckets, fake._pool, fake._capture = True, {}, "pool", capture
    fake.adapters = SimpleNamespace(weights=torch.zeros(1))
    assert fake._run([], "shape", True) == "values"
    assert steps == ["empty", "replay"]
    assert fake._pool == "another pool"


def test_a_pass_without_a_loss(model: Any, make_table: MakeTable) -> None:
    """A part of a batch may have no token with a loss."""
    engine, ids = make_engine(model, 1, 4), [[1, 2, 3, 4], [5, 6]]
    rows = TokenizedRows(ids, [[-100] * len(row) for row in ids])
    metrics = engine.step([Span(0, rows, [0, 1], make_table())]).read()
    assert (metrics.losses, metrics.norms, metrics.hits) == ([0.0], [0.0], [0.0])
    assert not engine.adapters.weights.any()


@pytest.mark.parametrize(
    ("tokens", "targets", "max_targets"),
    [(256, 0, 64), (256, 64, 64), (256, 65, 128), (256, 200, 256), (320, 300, 320)],
)
def test_on_a_gpu_buckets_have_targets_in_quarters(model: Any, tokens: int, targets: int, max_targets: int) -> None:
    engine = make_engine(model, 1, 4)
    engine._on_gpu = True
    assert engine._bucket_of(tokens, targets, 1).max_targets == max_targets
