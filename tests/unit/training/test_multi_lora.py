"""Who steps with whom, and what becomes of a member that ends or breaks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from orchestrator.training.fast.drive.multi_lora import Batch, MultiLora, Task, TrialSteps
from orchestrator.training.fast.step.engine import EvaluationBatch
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows

TILE = 8
NO_ENGINE: Any = None
"""A member names the engine when it asks."""


@dataclass(frozen=True)
class Passed:
    """What a pass answers: its number."""

    number: int


class FakeEngine:
    """Keeps what it is asked for, in order."""

    def __init__(self, max_tokens: int = 20) -> None:
        self.max_tokens = max_tokens
        self.passes: list[list[Span]] = []
        self.asked: list[list[EvaluationBatch]] = []
        self.told: list[str] = []
        self.fault: Exception | None = None

    def whole_tiles(self, tokens: int) -> int:
        return tokens + -tokens % TILE

    def step(self, spans: Sequence[Span]) -> Any:
        self.told.append("step")
        if self.fault:
            raise self.fault
        self.passes.append(list(spans))
        return Passed(len(self.passes) - 1)

    def evaluate(self, asked: Sequence[EvaluationBatch]) -> list[tuple[float, float]]:
        self.told.append("evaluate")
        if self.fault:
            raise self.fault
        self.asked.append(list(asked))
        return [(float(held.slot), len(held.rows) / 10) for held in asked]

    @property
    def indices(self) -> list[dict[int, list[int]]]:
        """Of each pass: slot -> rows."""
        return [{span.slot: list(span.indices) for span in spans} for spans in self.passes]


class Member:
    """A trial of given tasks, and what it saw."""

    def __init__(self, *tasks: Task, breaks_after: int | None = None) -> None:
        self.answers: list[Any] = []
        self.ended_by: str | BaseException | None = None
        self._tasks = tasks
        self._breaks_after = breaks_after

    def work(self, engine: Any) -> TrialSteps:
        """Ask this engine for the tasks. A fault is kept and not raised, as in `Attempt.run`."""
        try:
            for number, task in enumerate(self._tasks):
                if number == self._breaks_after:
                    raise ValueError("its own")
                self.answers.append((yield replace(task, engine=engine)))
        except Exception as error:
            self.ended_by = error
        except GeneratorExit:
            self.ended_by = "closed"
            raise
        else:
            self.ended_by = "done"


MakeRows = Callable[..., TokenizedRows]


@pytest.fixture
def batch(make_rows: MakeRows) -> Callable[..., Batch]:
    """`batch(slot, 5, 12)`: a batch of rows of these lengths; `order` gives another order of them."""

    def make(slot: int, *lengths: int, order: Sequence[int] = ()) -> Batch:
        rows, indices = make_rows(*lengths), list(order or range(len(lengths)))
        return Batch(NO_ENGINE, slot, rows, indices, {"applies": 1, "scale": slot + 0.5})

    return make


def run(pack: MultiLora, most: int = 100) -> int:
    """Turns until all have ended."""
    turns = 0
    while len(pack):
        pack.turn()
        turns += 1
        assert turns < most
    return turns


# One member


@pytest.mark.parametrize(
    ("max_tokens", "batches"),
    [
        (100, [[3, 0, 1, 2, 4]]),
        (10, [[3, 0], [1], [2, 4]]),
        (8, [[3], [0], [1], [2, 4]]),
        (3, [[3], [0], [1], [2], [4]]),
    ],
)
def test_passes_keep_the_order_and_the_limit(
    batch: Callable[..., Batch], max_tokens: int, batches: list[list[int]]
) -> None:
    engine, member = FakeEngine(max_tokens), Member(batch(0, 3, 9, 2, 7, 6, order=[3, 0, 1, 2, 4]))
    pack = MultiLora()
    pack.join(member.work(engine))
    run(pack)
    assert [each[0] for each in engine.indices] == batches
    assert member.answers == [[Passed(number) for number in range(len(batches))]]


def test_a_row_that_is_longer_than_the_limit_stands_alone(batch: Callable[..., Batch]) -> None:
    engine, pack = FakeEngine(10), MultiLora()
    pack.join(Member(batch(0, 1, 50, 1, 1)).work(engine))
    run(pack)
    assert engine.indices == [{0: [0]}, {0: [1]}, {0: [2, 3]}]


def test_a_batch_that_is_too_long_goes_over_passes_of_which_the_last_applies(batch: Callable[..., Batch]) -> None:
    engine = FakeEngine()
    task = batch(1, 7, 12, 5, 9, 30, order=[2, 1, 4, 0, 3])
    pack = MultiLora()
    pack.join(Member(task, batch(1, 4)).work(engine))
    run(pack)
    spans = [span for spans in engine.passes for span in spans]
    assert [list(span.indices) for span in spans] == [[2, 1], [4], [0, 3], [0]]
    assert [span.first_token for span in spans] == [0, 17, 47, 0], "the next batch counts from 0"
    assert [span.table["applies"] for span in spans] == [0, 0, 1, 1]
    assert {span.table["scale"] for span in spans} == {1.5}, "the rest of the table is the batch's"
    assert task.table["applies"] == 1, "the batch itself is left as it was"
    assert {span.slot for span in spans} == {1}


# Several


def test_unequal_batches_share_passes_without_waiting(batch: Callable[..., Batch]) -> None:
    """Slot 0 takes two passes a batch, slot 1 one: it makes two steps meanwhile."""
    engine = FakeEngine(max_tokens=32)
    large, small = Member(batch(0, 16, 16), batch(0, 16, 16)), Member(*[batch(1, 8)] * 4)
    pack = MultiLora()
    pack.join(small.work(engine))
    pack.join(large.work(engine))
    assert run(pack) == 4
    assert engine.indices == [{1: [0], 0: [0]}, {1: [0], 0: [1]}, {1: [0], 0: [0]}, {1: [0], 0: [1]}]
    assert small.answers == [[Passed(number)] for number in range(4)]
    assert large.answers == [[Passed(0), Passed(1)], [Passed(2), Passed(3)]]
    applies = [{span.slot: span.table["applies"] for span in spans} for spans in engine.passes]
    assert applies == [{1: 1, 0: 0}, {1: 1, 0: 1}] * 2


def test_a_pass_counts_whole_tiles(batch: Callable[..., Batch]) -> None:
    """Three batches of one token take three tiles: the fourth finds no room."""
    engine, pack = FakeEngine(max_tokens=3 * TILE), MultiLora()
    for slot in range(4):
        pack.join(Member(batch(slot, 1)).work(engine))
    run(pack)
    assert [sorted(each) for each in engine.indices] == [[0, 1, 2], [3]]


def test_who_had_none_goes_first(batch: Callable[..., Batch]) -> None:
    """Five members, room for two: no one waits for more than two passes, none has two before all have one."""
    engine, pack = FakeEngine(max_tokens=2 * TILE), MultiLora()
    members = [Member(*[batch(slot, TILE)] * 6) for slot in range(5)]
    for member in members:
        pack.join(member.work(engine))
    for turn in range(1, 15):
        pack.turn()
        counts = [len(member.answers) for member in members]
        assert sum(counts) == 2 * turn
        assert max(counts) - min(counts) <= 1
    run(pack)
    assert {len(member.answers) for member in members} == {6}


def test_a_member_too_large_for_what_is_left_is_first_the_next_time(batch: Callable[..., Batch]) -> None:
    """A smaller one behind it may fill the pass, but cannot hold it back."""
    engine, pack = FakeEngine(max_tokens=32), MultiLora()
    for slot, tokens in ((0, 16), (1, 24), (2, 8)):
        pack.join(Member(*[batch(slot, tokens)] * 3).work(engine))
    pack.turn()
    pack.turn()
    assert [list(each) for each in engine.indices] == [[0, 2], [1, 2]]
    run(pack)
    assert [list(each) for each in engine.indices] == [[0, 2], [1, 2], [0, 2], [1], [0], [1]]


def test_one_that_joins_is_in_the_next_pass_and_one_that_ends_leaves_its_room(batch: Callable[..., Batch]) -> None:
    engine, pack = FakeEngine(max_tokens=64), MultiLora()
    first, second, third = Member(batch(0, 8)), Member(*[batch(1, 8)] * 3), Member(*[batch(2, 8)] * 2)
    pack.join(first.work(engine))
    pack.join(second.work(engine))
    pack.turn()
    assert first.ended_by == "done"
    assert second.ended_by is None
    pack.join(third.work(engine))
    assert len(pack) == 2
    run(pack)
    assert [sorted(each) for each in engine.indices] == [[0, 1], [1, 2], [1, 2]]


def test_one_that_has_nothing_to_do_ends_at_once() -> None:
    engine, pack, member = FakeEngine(), MultiLora(), Member()
    pack.join(member.work(engine))
    assert member.ended_by == "done"
    assert len(pack) == 0


# Several engines


def test_members_with_an_engine_each_step_by_themselves_in_every_turn(
    batch: Callable[..., Batch], make_rows: MakeRows
) -> None:
    """One evaluates while the other trains; a fault of one engine ends its own member alone."""
    engines, pack = [FakeEngine(max_tokens=16) for _ in range(3)], MultiLora()
    held = EvaluationBatch(NO_ENGINE, 0, make_rows(5), {})
    members = [Member(batch(0, 8, 8, 8), batch(0, 8)), Member(batch(0, 8), held, batch(0, 8)), Member(batch(0, 8))]
    for member, engine in zip(members, engines, strict=True):
        pack.join(member.work(engine))
    engines[2].fault = RuntimeError("CUDA")
    pack.turn()
    assert members[2].ended_by is engines[2].fault
    run(pack)
    assert [engine.told for engine in engines] == [["step"] * 3, ["step", "evaluate", "step"], ["step"]]
    assert engines[0].indices == [{0: [0, 1]}, {0: [2]}, {0: [0]}], "a batch is split as it is alone"
    assert [member.ended_by for member in members[:2]] == ["done"] * 2


# Evaluations


def test_evaluations_of_several_members_are_one_call(batch: Callable[..., Batch], make_rows: MakeRows) -> None:
    """Before the next pass; a member in the middle of its batch goes on with it afterwards."""
    engine, pack = FakeEngine(max_tokens=16), MultiLora()
    held = {slot: EvaluationBatch(NO_ENGINE, slot, make_rows(*[5] * (slot + 1)), {}) for slot in (0, 1)}
    one, other = (Member(batch(slot, TILE), held[slot], batch(slot, TILE)) for slot in (0, 1))
    third = Member(batch(2, 8, 8, 8))
    for member in (one, other, third):
        pack.join(member.work(engine))
    run(pack)
    assert engine.told[:2] == ["step", "evaluate"]
    assert [[each.rows for each in asked] for asked in engine.asked] == [[held[0].rows, held[1].rows]]
    assert one.answers[1] == (0.0, 0.1)
    assert other.answers[1] == (1.0, 0.2)
    spans = [span for spans in engine.passes for span in spans if span.slot == 2]
    assert [index for span in spans for index in span.indices] == [0, 1, 2]
    assert [span.first_token for span in spans] == [8 * span.indices[0] for span in spans]
    assert [span.table["applies"] for span in spans] == [0] * (len(spans) - 1) + [1]


def test_one_evaluation_keeps_no_other_from_its_step_for_long(batch: Callable[..., Batch], make_rows: MakeRows) -> None:
    engine, pack = FakeEngine(max_tokens=64), MultiLora()
    evaluating = Member(batch(0, 8), EvaluationBatch(NO_ENGINE, 0, make_rows(5), {}), batch(0, 8))
    steady = Member(*[batch(1, 8)] * 3)
    pack.join(evaluating.work(engine))
    pack.join(steady.work(engine))
    assert run(pack) == 4
    assert engine.told == ["step", "evaluate", "step", "step"]
    assert [sorted(each) for each in engine.indices] == [[0, 1], [0, 1], [1]]


# Faults


def test_a_members_own_fault_stays_its_own(batch: Callable[..., Batch]) -> None:
    engine, pack = FakeEngine(max_tokens=64), MultiLora()
    broken, sound = Member(*[batch(0, 8)] * 3, breaks_after=2), Member(*[batch(1, 8)] * 4)
    pack.join(broken.work(engine))
    pack.join(sound.work(engine))
    run(pack)
    assert isinstance(broken.ended_by, ValueError)
    assert sound.ended_by == "done"
    assert [sorted(each) for each in engine.indices] == [[0, 1], [0, 1], [1], [1]]


def test_one_that_breaks_before_its_first_task_is_no_member(batch: Callable[..., Batch]) -> None:
    engine, pack, member = FakeEngine(), MultiLora(), Member(batch(0, 8), breaks_after=0)
    pack.join(member.work(engine))
    assert isinstance(member.ended_by, ValueError)
    assert len(pack) == 0


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_fault_of_the_engine_is_a_fault_of_all(
    batch: Callable[..., Batch], make_rows: MakeRows, evaluates: bool
) -> None:
    engine, pack = FakeEngine(max_tokens=8), MultiLora()
    first: Task = EvaluationBatch(NO_ENGINE, 0, make_rows(5), {}) if evaluates else batch(0, 8)
    members = [Member(first, batch(0, 8)), Member(batch(1, 8)), Member(batch(2, 8, 8))]
    for member in members:
        pack.join(member.work(engine))
    engine.fault = RuntimeError("CUDA")
    pack.turn()
    assert [member.ended_by for member in members] == [engine.fault] * 3
    assert len(pack) == 0
    engine.fault, after = None, Member(batch(1, 8))
    pack.join(after.work(engine))
    run(pack)
    assert after.ended_by == "done"


def test_what_ends_the_process_is_not_taken_for_a_fault(batch: Callable[..., Batch]) -> None:
    pack = MultiLora()

    def interrupted() -> TrialSteps:
        yield replace(batch(0, 8), engine=FakeEngine())  # type: ignore[arg-type]
        raise KeyboardInterrupt

    pack.join(interrupted())
    with pytest.raises(KeyboardInterrupt):
        pack.turn()


def test_closing_ends_all_where_they_stand(batch: Callable[..., Batch]) -> None:
    engine, pack = FakeEngine(max_tokens=64), MultiLora()
    members = [Member(*[batch(slot, 8)] * 3) for slot in range(2)]
    for member in members:
        pack.join(member.work(engine))
    pack.turn()
    pack.close()
    assert [member.ended_by for member in members] == ["closed"] * 2
    assert [len(member.answers) for member in members] == [1, 1]
    assert len(pack) == 0
