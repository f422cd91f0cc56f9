"""Trials that share an engine, on the CPU in float32 with dropout: each has the results that it has alone."""

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_engine import LATE, LOSS, OTHER, SINGLE, UPDATE, WILD, A, B, Bench, Trained, train_alone, trial

from orchestrator.adapters.bundle import Adapter
from orchestrator.errors import TrialError
from orchestrator.record import RowScores, TrialPaths
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.plan.factory import release
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch
from orchestrator.training.worker.file_writers import FileWriter
from orchestrator.training.worker.slots import SlotLease
from orchestrator.training.write_queue import WriteQueue

pytestmark = pytest.mark.slow


def assert_same(seen: Trained, solo: Trained, loss: float = LOSS, update: float = UPDATE) -> None:
    """Compare each step's loss, norm and learning rate, each evaluation, and the final update."""
    assert seen.error is None
    for name, bound in (("rates", 0.0), ("losses", loss)):
        found, expected = getattr(seen, name), getattr(solo, name)
        assert found.keys() == expected.keys()
        assert max(abs(found[step] - expected[step]) for step in expected) <= bound, name
    assert seen.norms == pytest.approx(solo.norms, rel=1e-3)
    assert seen.evaluations.keys() == solo.evaluations.keys()
    for step, values in solo.evaluations.items():
        assert seen.evaluations[step]["eval/loss"] == pytest.approx(values["eval/loss"], abs=loss)
        # In 150 tokens, one may have two candidates that are equally likely.
        assert seen.evaluations[step]["eval/token_accuracy"] == pytest.approx(values["eval/token_accuracy"], abs=8e-3)
    assert all(torch.equal(seen.start[name], start) for name, start in solo.start.items())
    assert solo.update.norm() > 0.1
    assert (seen.update - solo.update).norm() <= update * solo.update.norm()


def bits(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the bits, so that NaN compares equal to itself."""
    return [tensor.contiguous().view(torch.int32) for tensor in tensors]


def assert_identical(seen: Trained, other: Trained) -> None:
    assert seen.error is None
    assert (seen.losses, seen.norms, seen.evaluations) == (other.losses, other.norms, other.evaluations)
    assert seen.end.keys() == other.end.keys()
    assert all(torch.equal(seen.end[name], end) for name, end in other.end.items())


# A trial among others, compared with the same trial alone


def test_eight_bit_moments_are_those_of_the_trial_alone(inputs: TrialInputs, tmp_path: Path) -> None:
    """With the stack's rank and with a smaller one; in a slot that another trial had; and from a checkpoint."""
    eight = ["training.optimizer=adamw_8bit"]
    high, low = trial(*A, *eight, "lora.rank=64"), trial(*B, *eight, "lora.rank=48", "training.save_steps=7")
    bench = Bench(inputs, tmp_path, 3, [high, low])
    assert bench.engine.adapters.rank == 64
    assert bench.engine.adapters.moment1.dtype == torch.uint8
    early = bench.join(0, trial(*OTHER, *eight), stop_at=3, name="early")
    assert early.loop.read_back()["training.optimizer"] == "bitsandbytes.AdamW 8-bit"
    wrong = Bench(inputs, tmp_path / "wrong", 2, [trial(*A)]).join(0, trial(*A, *eight))
    assert wrong.loop.read_back()["training.optimizer"] == ["bitsandbytes.AdamW 8-bit", "torch.float32 moments"]
    seen = {"low": bench.join(2, low, name="low")}
    while not early.end:
        bench.turn(1)
    seen["high"] = bench.join(0, high, name="high")
    bench.run()
    for name, config in {"low": low, "high": high}.items():
        assert_same(seen[name], train_alone(inputs, tmp_path / "alone" / name, config), update=0.01)
    resumed = train_alone(inputs, tmp_path / "resumed", low, tmp_path / "low" / "checkpoint-7")
    assert resumed.losses == pytest.approx({at: loss for at, loss in seen["low"].losses.items() if at > 7}, abs=1e-5)


@pytest.fixture(scope="module")
def solos(inputs: TrialInputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return {name: train_alone(inputs, tmp_path_factory.mktemp(name), trial(*of)) for name, of in (("A", A), ("B", B))}


ALL = [trial(*each) for each in (A, B, OTHER, SINGLE, WILD, LATE)]


@pytest.mark.parametrize(
    ("first", "last", "max_tokens"), [("A", "B", None), ("B", "A", None), ("A", "B", 150)],
    ids=["A first", "A last", "several passes a batch"],
)  # fmt: skip
def test_trials_in_first_and_last_slot_are_as_alone(
    inputs: TrialInputs,
    solos: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    last: str,
    max_tokens: int | None,
) -> None:
    """Six slots lie between them, with trials of which one leaves, one diverges, one gets NaN, and one joins later."""
    evaluate, asked = Engine.evaluate, []

    def observed_evaluate(engine: Engine, batches: Sequence[EvaluationBatch], *rest: Any) -> list[RowScores]:
        asked.append([each.slot for each in batches])
        return evaluate(engine, batches, *rest)

    monkeypatch.setattr(Engine, "evaluate", observed_evaluate)
    bench = Bench(inputs, tmp_path, 8, ALL)
    if max_tokens is not None:
        monkeypatch.setattr(bench.engine, "max_tokens", max_tokens)
    configs = {"A": trial(*A), "B": trial(*B)}
    others = {
        3: bench.join(3, trial(*OTHER)),
        5: bench.join(5, trial(*WILD)),
        2: bench.join(2, trial(*SINGLE), stop_at=6),
    }
    seen = {last: bench.join(7, configs[last]), first: bench.join(0, configs[first])}
    poisoned = bench.join(4, trial(*LATE, "training.seed=5", "training.steps=30"))
    bench.turn(5)
    others[1] = bench.join(1, trial(*LATE))
    bench.engine.adapters.weights[4, :100] = math.nan
    bench.run()
    for name, each in seen.items():
        assert_same(each, solos[name])
    assert isinstance(others[5].error, TrialError)
    assert isinstance(poisoned.error, TrialError)
    assert "is nan at step" in str(poisoned.error)
    assert (others[2].error, others[2].ended_at) == (None, 6)
    assert (others[1].error, others[1].ended_at) == (None, 5)
    assert (others[3].error, others[3].ended_at) == (None, 7)
    assert any(not {0, 7} & set(slots) for slots in asked), "others evaluate at other steps"
    if max_tokens is None:
        assert any(len(slots) > 1 for slots in asked), "several trials were evaluated in one pass"


def test_trials_beside_a_diverged_first_slot_are_as_alone(
    inputs: TrialInputs, solos: dict[str, Trained], tmp_path: Path
) -> None:
    """The padding of a flat batch is computed with the first slot's adapter."""
    bench = Bench(inputs, tmp_path, 3, ALL)
    sick = bench.join(0, trial(*WILD))
    seen = {"A": bench.join(1, trial(*A)), "B": bench.join(2, trial(*B))}
    bench.run()
    assert isinstance(sick.error, TrialError)
    assert not bench.engine.adapters.weights[0].isfinite().all() or not bench.engine.adapters.weights[0].abs().max() < 1
    for name, each in seen.items():
        assert_same(each, solos[name])


def test_same_trial_in_all_slots_gives_the_same_results(
    inputs: TrialInputs, solos: dict[str, Trained], tmp_path: Path
) -> None:
    bench = Bench(inputs, tmp_path, 3, ALL)
    seen = [bench.join(slot, trial(*B)) for slot in range(3)]
    bench.run()
    for each in seen:
        assert_same(each, solos["B"])


# Slots that are idle, freed, or used again


def test_idle_and_freed_slots_do_not_change(inputs: TrialInputs, tmp_path: Path) -> None:
    """Neither does the padding of ranks and layers that a trial does not have."""
    release(inputs.base)
    bench = Bench(inputs, tmp_path, 5, ALL)
    idle, short, sick, long, late = range(5)
    for flat in bench.flats:
        flat[idle].uniform_(0.1, 1.0)
    before = bench.row(idle)
    bench.join(short, trial(*OTHER, "training.weight_decay=0.5"), stop_at=4)
    failing = bench.join(sick, trial(*WILD))
    last = bench.join(long, trial(*B, "training.weight_decay=0.5"))
    while last.ended_at < 6:
        bench.turn(1)
    assert failing.error is not None
    freed = {slot: bench.row(slot) for slot in (short, sick)}
    assert freed[short][1].any()
    assert bench.engine.adapters.gradients.isfinite().all(1).tolist()[3]
    bench.join(late, trial(*LATE))
    bench.run()
    for slot, rows in {idle: before, **freed}.items():
        assert all(map(torch.equal, bits(bench.row(slot)), bits(rows))), f"slot {slot} changed"
    saved, asked = last.loop.adapter(), Adapter.of(last.loop.trainer.model)
    assert saved.config.to_dict() == asked.config.to_dict()
    assert saved.weights.keys() == asked.weights.keys(), "the names are those of PEFT's file"
    assert all(torch.equal(saved.weights[name], matrix) for name, matrix in asked.weights.items())
    for flat in bench.flats:
        for matrix in last.loop._view.matrices(flat).values():
            assert matrix.any()
            matrix.zero_()
        assert not flat[long].any(), "the padding stays zero"


def test_reused_slot_keeps_nothing_of_earlier_trials(inputs: TrialInputs, tmp_path: Path) -> None:
    """Not after a trial of another rank with NaN everywhere, and not after one that ended within a batch."""
    release(inputs.base)
    fresh = Bench(inputs, tmp_path, 3, ALL)
    expected = fresh.join(1, trial(*A))
    fresh.run()

    release(inputs.base)
    bench = Bench(inputs, tmp_path, 3, ALL)
    assert bench.engine is not fresh.engine
    bench.join(1, trial(*OTHER, "training.learning_rate=1e-2"), stop_at=6)
    sick = bench.join(1, trial(*WILD))
    while sick.error is None:
        bench.turn(1)
    bench.multi_lora.close()
    for flat in (*bench.flats, bench.engine.adapters.gradients):
        flat[1] = math.nan
    again = bench.join(1, trial(*A))
    bench.run()
    assert_identical(again, expected)

    bench.join(1, trial(*OTHER))
    whole, bench.engine.max_tokens = bench.engine.max_tokens, 40
    bench.turn(2)
    bench.multi_lora.close()
    assert bench.engine.adapters.gradients[1].any(), "it ended within its batch"
    bench.engine.max_tokens = whole
    again = bench.join(1, trial(*A))
    bench.run()
    assert_identical(again, expected)


# Checkpoints


def held_write_queue() -> tuple[WriteQueue, threading.Event, Callable[[], None]]:
    """Return a worker's file writer that waits for the event, the event, and a function that waits for its end."""
    writer, gate = FileWriter(SlotLease("1", 0, None, TrialPaths(Path("/none"), "a"))), threading.Event()  # type: ignore[arg-type]
    writer.do(lambda: (gate.wait(300), None)[1])

    def finish() -> None:
        writer.close()
        writer.thread.join()

    return writer, gate, finish


def test_checkpoint_from_a_shared_engine_continues_alone(
    inputs: TrialInputs, solos: dict[str, Trained], tmp_path: Path
) -> None:
    """The checkpoint is written long after its step."""
    write_queue, gate, written = held_write_queue()
    bench = Bench(inputs, tmp_path / "shared", 3, ALL)
    bench.join(0, trial(*OTHER))
    whole = bench.join(2, trial(*A, "training.save_steps=9"), write_queue=write_queue, name="A")
    bench.run()
    checkpoint = tmp_path / "shared" / "A" / "checkpoint-9"
    assert not checkpoint.exists()
    gate.set()
    written()
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint-14", "checkpoint-9"]

    single = Bench(inputs, tmp_path / "alone", 1, [trial(*A)])
    resumed = single.join(0, trial(*A), checkpoint)
    assert all(map(torch.equal, single.matrices(resumed.loop), whole.saved[9])), "weights or moments differ"
    single.run()
    for other in (whole, solos["A"]):
        assert_continues(resumed, other, 9)


def test_checkpoint_from_alone_continues_in_a_shared_engine(inputs: TrialInputs, tmp_path: Path) -> None:
    single = Bench(inputs, tmp_path / "alone", 1, [trial(*B)])
    whole = single.join(0, trial(*B, "training.save_steps=7"))
    single.run()
    bench = Bench(inputs, tmp_path / "shared", 4, ALL)
    bench.join(0, trial(*OTHER))
    bench.turn(3)
    resumed = bench.join(3, trial(*B), tmp_path / "alone" / "0" / "checkpoint-7")
    bench.join(1, trial(*LATE))
    assert all(map(torch.equal, bench.matrices(resumed.loop), whole.saved[7])), "weights or moments differ"
    bench.run()
    assert_continues(resumed, whole, 7)


def assert_continues(resumed: Trained, whole: Trained, step: int) -> None:
    """Compare within 2e-6, because a shared engine sums in another order."""
    assert resumed.error is None
    assert resumed.losses == pytest.approx({at: loss for at, loss in whole.losses.items() if at > step}, abs=2e-6)
    assert resumed.rates == {at: rate for at, rate in whole.rates.items() if at > step}
    assert resumed.evaluations.keys() == {at for at in whole.evaluations if at > step}
    for at, values in resumed.evaluations.items():
        assert values["eval/loss"] == pytest.approx(whole.evaluations[at]["eval/loss"], abs=2e-6)
    for name, end in whole.end.items():
        assert (resumed.end[name] - end).norm() <= 1e-4 * end.norm()


def test_resume_in_the_same_slot_is_identical(inputs: TrialInputs, tmp_path: Path) -> None:
    write_queue, gate, written = held_write_queue()
    bench = Bench(inputs, tmp_path, 3, ALL)
    whole = bench.join(1, trial(*A, "training.save_steps=7"), write_queue=write_queue)
    bench.run()
    gate.set()
    written()
    bench = Bench(inputs, tmp_path, 3, ALL)
    resumed = bench.join(1, trial(*A), tmp_path / "1" / "checkpoint-7")
    bench.run()
    assert resumed.losses == {at: loss for at, loss in whole.losses.items() if at > 7}
    assert resumed.evaluations == {at: values for at, values in whole.evaluations.items() if at > 7}
    assert all(torch.equal(resumed.end[name], end) for name, end in whole.end.items())
