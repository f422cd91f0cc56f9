"""Which members step together, and what happens to members that end or fail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from orchestrator.training.fast.drive.multi_lora import Batch, MultiLora, Task, TrialSteps
from orchestrator.training.fast.step.engine import EvaluationBatch, GenerationBatch
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows
from orchestrator.training.fast.step.generation import Asked

TILE = 8
NO_ENGINE: Any = None
"""Placeholder: `Trial.steps` sets the engine."""


@dataclass(frozen=True)
class Passed:
    """The answer of a pass: its number."""

    number: int


class FakeEngine:
    """Records the calls that it gets."""

    def __init__(self, max_tokens: int = 20) -> None:
        self.max_tokens = max_tokens
        self.passes: list[list[Span]] = []
        self.evaluations: list[list[EvaluationBatch]] = []
        self.generated: list[list[Asked]] = []
        self.calls: list[str] = []
        self.error: Exception | None = None

    def whole_tiles(self, tokens: int) -> int:
        return tokens + -tokens % TILE

    def step(self, spans: Sequence[Span]) -> Any:
        self.calls.append("step")
        if self.error:
            raise self.error
        self.passes.append(list(spans))
        return Passed(len(self.passes) - 1)

    def evaluate(
        self, evaluations: Sequence[EvaluationBatch], on_pass: Callable[[], None]
    ) -> list[tuple[float, float]]:
        self.calls.append("evaluate")
        on_pass()
        if self.error:
            raise self.error
        self.evaluations.append(list(evaluations))
        return [(float(each.slot), len(each.rows) / 10) for each in evaluations]

    def generate(self, batches: Sequence[GenerationBatch], on_pass: Callable[[], None]) -> list[list[list[int]]]:
        self.calls.append("generate")
        on_pass()
        self.generated.append([batch.asked for batch in batches])
        return [[[batch.asked.slot]] for batch in batches]

    @property
    def indices(self) -> list[dict[int, list[int]]]:
        """For each pass, slot -> numbers of its rows."""
        return [{span.slot: list(span.indices) for span in spans} for spans in self.passes]


class Trial:
    """A trial with given tasks that records their answers."""

    def __init__(self, *tasks: Task, fails_after: int | None = None) -> None:
        self.answers: list[Any] = []
        self.ended_by: str | BaseException | None = None
        self._tasks = tasks
        self._fails_after = fails_after

    def steps(self, engine: Any) -> TrialSteps:
        """Yield the tasks for this engine. Errors are recorded and not raised, as in `Attempt.run`."""
        try:
            for number, task in enumerate(self._tasks):
                if number == self._fails_after:
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
    """Make a batch of rows of given lengths: `batch(slot, 5, 12)`. `order` lists the rows in another order."""

    def make(slot: int, *lengths: int, order: Sequence[int] = ()) -> Batch:
        rows, indices = make_rows(*lengths), list(order or range(len(lengths)))
        return Batch(NO_ENGINE, slot, rows, indices, {"applies": 1, "scale": slot + 0.5})

    return make


def run(multi_lora: MultiLora, max_turns: int = 100) -> int:
    """Run turns until all members have ended, and return their number."""
    turns = 0
    while len(multi_lora):
        multi_lora.turn()
        turns += 1
        assert turns < max_turns
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
    engine, member = FakeEngine(max_tokens), Trial(batch(0, 3, 9, 2, 7, 6, order=[3, 0, 1, 2, 4]))
    multi_lora = MultiLora()
    multi_lora.join(member.steps(engine))
    run(multi_lora)
    assert [each[0] for each in engine.indices] == batches
    assert member.answers == [[Passed(number) for number in range(len(batches))]]


def test_a_row_longer_than_the_limit_has_a_pass_of_its_own(batch: Callable[..., Batch]) -> None:
    engine, multi_lora = FakeEngine(10), MultiLora()
    multi_lora.join(Trial(batch(0, 1, 50, 1, 1)).steps(engine))
    run(multi_lora)
    assert engine.indices == [{0: [0]}, {0: [1]}, {0: [2, 3]}]


def test_a_long_batch_takes_several_passes_and_the_last_one_applies(batch: Callable[..., Batch]) -> None:
    engine = FakeEngine()
    task = batch(1, 7, 12, 5, 9, 30, order=[2, 1, 4, 0, 3])
    multi_lora = MultiLora()
    multi_lora.join(Trial(task, batch(1, 4)).steps(engine))
    run(multi_lora)
    spans = [span for spans in engine.passes for span in spans]
    assert [list(span.indices) for span in spans] == [[2, 1], [4], [0, 3], [0]]
    assert [span.first_token for span in spans] == [0, 17, 47, 0], "the next batch counts from 0"
    assert [span.table["applies"] for span in spans] == [0, 0, 1, 1]
    assert {span.table["scale"] for span in spans} == {1.5}, "the rest of the table is that of the batch"
    assert task.table["applies"] == 1, "the batch itself does not change"
    assert {span.slot for span in spans} == {1}


# Several


def test_unequal_batches_share_passes_without_waiting(batch: Callable[..., Batch]) -> None:
    """A batch takes two passes in slot 0 and one in slot 1, which makes two steps in that time."""
    engine = FakeEngine(max_tokens=32)
    large, small = Trial(batch(0, 16, 16), batch(0, 16, 16)), Trial(*[batch(1, 8)] * 4)
    multi_lora = MultiLora()
    multi_lora.join(small.steps(engine))
    multi_lora.join(large.steps(engine))
    assert run(multi_lora) == 4
    assert engine.indices == [{1: [0], 0: [0]}, {1: [0], 0: [1]}, {1: [0], 0: [0]}, {1: [0], 0: [1]}]
    assert small.answers == [[Passed(number)] for number in range(4)]
    assert large.answers == [[Passed(0), Passed(1)], [Passed(2), Passed(3)]]
    applies = [{span.slot: span.table["applies"] for span in spans} for spans in engine.passes]
    assert applies == [{1: 1, 0: 0}, {1: 1, 0: 1}] * 2


def test_a_pass_counts_whole_tiles(batch: Callable[..., Batch]) -> None:
    """Three batches of one token fill three tiles, so that the fourth has to wait."""
    engine, multi_lora = FakeEngine(max_tokens=3 * TILE), MultiLora()
    for slot in range(4):
        multi_lora.join(Trial(batch(slot, 1)).steps(engine))
    run(multi_lora)
    assert [sorted(each) for each in engine.indices] == [[0, 1, 2], [3]]


def test_members_without_rows_in_the_last_pass_go_first(batch: Callable[..., Batch]) -> None:
    """Two of five members fit: each waits for two passes at most, and none gets two before all have one."""
    engine, multi_lora = FakeEngine(max_tokens=2 * TILE), MultiLora()
    members = [Trial(*[batch(slot, TILE)] * 6) for slot in range(5)]
    for member in members:
        multi_lora.join(member.steps(engine))
    for turn in range(1, 15):
        multi_lora.turn()
        counts = [len(member.answers) for member in members]
        assert sum(counts) == 2 * turn
        assert max(counts) - min(counts) <= 1
    run(multi_lora)
    assert {len(member.answers) for member in members} == {6}


def test_a_batch_that_does_not_fit_is_first_in_the_next_pass(batch: Callable[..., Batch]) -> None:
    """A smaller batch behind it may fill the pass, but cannot delay it further."""
    engine, multi_lora = FakeEngine(max_tokens=32), MultiLora()
    for slot, tokens in ((0, 16), (1, 24), (2, 8)):
        multi_lora.join(Trial(*[batch(slot, tokens)] * 3).steps(engine))
    multi_lora.turn()
    multi_lora.turn()
    assert [list(each) for each in engine.indices] == [[0, 2], [1, 2]]
    run(multi_lora)
    assert [list(each) for each in engine.indices] == [[0, 2], [1, 2], [0, 2], [1], [0], [1]]


def test_a_new_member_is_in_the_next_pass_and_a_finished_one_frees_its_tokens(batch: Callable[..., Batch]) -> None:
    engine, multi_lora = FakeEngine(max_tokens=64), MultiLora()
    first, second, third = Trial(batch(0, 8)), Trial(*[batch(1, 8)] * 3), Trial(*[batch(2, 8)] * 2)
    multi_lora.join(first.steps(engine))
    multi_lora.join(second.steps(engine))
    multi_lora.turn()
    assert first.ended_by == "done"
    assert second.ended_by is None
    multi_lora.join(third.steps(engine))
    assert len(multi_lora) == 2
    run(multi_lora)
    assert [sorted(each) for each in engine.indices] == [[0, 1], [1, 2], [1, 2]]


def test_a_trial_without_tasks_ends_at_once() -> None:
    engine, multi_lora, member = FakeEngine(), MultiLora(), Trial()
    multi_lora.join(member.steps(engine))
    assert member.ended_by == "done"
    assert len(multi_lora) == 0


# Several engines


def test_members_with_their_own_engines_step_separately_in_every_turn(
    batch: Callable[..., Batch], make_rows: MakeRows
) -> None:
    """One evaluates while another trains. An error of one engine ends only its own member."""
    engines, multi_lora = [FakeEngine(max_tokens=16) for _ in range(3)], MultiLora()
    evaluation = EvaluationBatch(NO_ENGINE, 0, make_rows(5), {})
    members = [Trial(batch(0, 8, 8, 8), batch(0, 8)), Trial(batch(0, 8), evaluation, batch(0, 8)), Trial(batch(0, 8))]
    for member, engine in zip(members, engines, strict=True):
        multi_lora.join(member.steps(engine))
    engines[2].error = RuntimeError("CUDA")
    multi_lora.turn()
    assert members[2].ended_by is engines[2].error
    run(multi_lora)
    assert [engine.calls for engine in engines] == [["step"] * 3, ["step", "evaluate", "step"], ["step"]]
    assert engines[0].indices == [{0: [0, 1]}, {0: [2]}, {0: [0]}], "a batch is split as when it trains alone"
    assert [member.ended_by for member in members[:2]] == ["done"] * 2


# Evaluations


def test_evaluations_of_several_members_are_one_call(batch: Callable[..., Batch], make_rows: MakeRows) -> None:
    """They precede the next pass. A member in the middle of its batch continues afterwards."""
    engine, multi_lora = FakeEngine(max_tokens=16), MultiLora()
    evaluations = {slot: EvaluationBatch(NO_ENGINE, slot, make_rows(*[5] * (slot + 1)), {}) for slot in (0, 1)}
    one, other = (Trial(batch(slot, TILE), evaluations[slot], batch(slot, TILE)) for slot in (0, 1))
    third = Trial(batch(2, 8, 8, 8))
    for member in (one, other, third):
        multi_lora.join(member.steps(engine))
    run(multi_lora)
    assert engine.calls[:2] == ["step", "evaluate"]
    assert [[each.rows for each in call] for call in engine.evaluations] == [[evaluations[0].rows, evaluations[1].rows]]
    assert one.answers[1] == (0.0, 0.1)
    assert other.answers[1] == (1.0, 0.2)
    spans = [span for spans in engine.passes for span in spans if span.slot == 2]
    assert [index for span in spans for index in span.indices] == [0, 1, 2]
    assert [span.first_token for span in spans] == [8 * span.indices[0] for span in spans]
    assert [span.table["applies"] for span in spans] == [0] * (len(spans) - 1) + [1]


def test_members_that_evaluate_together_answer_together(batch: Callable[..., Batch], make_rows: MakeRows) -> None:
    """Answers come after the evaluations of all members, and before the next pass."""
    engine, multi_lora = FakeEngine(max_tokens=64), MultiLora()
    asked = {slot: Asked(slot, make_rows(3), 4, frozenset(), {}) for slot in (0, 1)}
    one, other = (
        Trial(
            batch(slot, 8),
            EvaluationBatch(NO_ENGINE, slot, make_rows(5), {}),
            GenerationBatch(NO_ENGINE, asked[slot]),
            batch(slot, 8),
        )
        for slot in (0, 1)
    )
    for member in (one, other, Trial(*[batch(2, 8)] * 2)):
        multi_lora.join(member.steps(engine))
    run(multi_lora)
    assert engine.calls == ["step", "evaluate", "generate", "step"]
    assert engine.generated == [[asked[0], asked[1]]]
    assert (one.answers[2], other.answers[2]) == ([[0]], [[1]])


def test_an_evaluation_delays_other_members_by_one_turn(batch: Callable[..., Batch], make_rows: MakeRows) -> None:
    engine, multi_lora = FakeEngine(max_tokens=64), MultiLora()
    evaluating = Trial(batch(0, 8), EvaluationBatch(NO_ENGINE, 0, make_rows(5), {}), batch(0, 8))
    steady = Trial(*[batch(1, 8)] * 3)
    multi_lora.join(evaluating.steps(engine))
    multi_lora.join(steady.steps(engine))
    assert run(multi_lora) == 4
    assert engine.calls == ["step", "evaluate", "step", "step"]
    assert [sorted(each) for each in engine.indices] == [[0, 1], [0, 1], [1]]


# Errors


def test_an_error_of_a_trial_ends_no_other(batch: Callable[..., Batch]) -> None:
    engine, multi_lora = FakeEngine(max_tokens=64), MultiLora()
    broken, sound = Trial(*[batch(0, 8)] * 3, fails_after=2), Trial(*[batch(1, 8)] * 4)
    multi_lora.join(broken.steps(engine))
    multi_lora.join(sound.steps(engine))
    run(multi_lora)
    assert isinstance(broken.ended_by, ValueError)
    assert sound.ended_by == "done"
    assert [sorted(each) for each in engine.indices] == [[0, 1], [0, 1], [1], [1]]


def test_a_trial_that_fails_before_its_first_task_is_not_added(batch: Callable[..., Batch]) -> None:
    engine, multi_lora, member = FakeEngine(), MultiLora(), Trial(batch(0, 8), fails_after=0)
    multi_lora.join(member.steps(engine))
    assert isinstance(member.ended_by, ValueError)
    assert len(multi_lora) == 0


@pytest.mark.parametrize("evaluates", [False, True])
def test_an_error_of_the_engine_ends_all_of_its_members(
    batch: Callable[..., Batch], make_rows: MakeRows, evaluates: bool
) -> None:
    engine, multi_lora = FakeEngine(max_tokens=8), MultiLora()
    first: Task = EvaluationBatch(NO_ENGINE, 0, make_rows(5), {}) if evaluates else batch(0, 8)
    members = [Trial(first, batch(0, 8)), Trial(batch(1, 8)), Trial(batch(2, 8, 8))]
    for member in members:
        multi_lora.join(member.steps(engine))
    engine.error = RuntimeError("CUDA")
    multi_lora.turn()
    assert [member.ended_by for member in members] == [engine.error] * 3
    assert len(multi_lora) == 0
    engine.error, after = None, Trial(batch(1, 8))
    multi_lora.join(after.steps(engine))
    run(multi_lora)
    assert after.ended_by == "done"


def test_a_keyboard_interrupt_is_not_caught(batch: Callable[..., Batch]) -> None:
    multi_lora = MultiLora()

    def interrupted() -> TrialSteps:
        yield replace(batch(0, 8), engine=FakeEngine())  # type: ignore[arg-type]
        raise KeyboardInterrupt

    multi_lora.join(interrupted())
    with pytest.raises(KeyboardInterrupt):
        multi_lora.turn()


def test_closing_ends_all_members_wherever_they_are(batch: Callable[..., Batch]) -> None:
    engine, multi_lora = FakeEngine(max_tokens=64), MultiLora()
    members = [Trial(*[batch(slot, 8)] * 3) for slot in range(2)]
    for member in members:
        multi_lora.join(member.steps(engine))
    multi_lora.turn()
    multi_lora.close()
    assert [member.ended_by for member in members] == ["closed"] * 2
    assert [len(member.answers) for member in members] == [1, 1]
    assert len(multi_lora) == 0


def test_each_pass_is_a_sign_of_life(batch: Callable[..., Batch]) -> None:
    """Otherwise a long evaluation, or long answers, would count as a hang."""
    engine, passes = FakeEngine(), list[None]()
    multi_lora = MultiLora(lambda: passes.append(None))
    task = batch(0, 4, 4)
    asked = GenerationBatch(NO_ENGINE, Asked(0, task.rows, 1, frozenset(), {}))
    evaluation = EvaluationBatch(NO_ENGINE, 0, task.rows, {})
    multi_lora.join(Trial(task, evaluation, asked).steps(engine))
    for number in range(1, 4):
        multi_lora.turn()
        assert len(passes) == number
    assert engine.calls == ["step", "evaluate", "generate"]
