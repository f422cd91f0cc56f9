"""Steps many trials (multi-LoRA): each trial yields what it needs next, and the engines do it for all of them.

Trials on one engine step jointly: a pass holds rows of all of them. Trials with an engine each step separately, so that
every metric of a trial has the same bits whatever else runs.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.training.fast.step.engine import Engine, EvaluationBatch, GenerationBatch, Pending
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows


@dataclass(frozen=True)
class Batch:
    """One optimizer step of a slot. Its answer is the list of `Pending` metrics, one for each pass it took."""

    engine: Engine
    slot: int
    """Number of the slot in the engine."""
    rows: TokenizedRows
    indices: Sequence[int]
    """Numbers of the batch's rows, in order."""
    table: dict[str, float]
    """The slot's values of `flat_batch.TABLE`, for the pass that ends the batch."""


Task = Batch | EvaluationBatch | GenerationBatch
"""What a trial needs next. The answer to an `EvaluationBatch` is its element of what `Engine.evaluate` returns, that to
a `GenerationBatch` its element of what `Engine.generate` returns."""

TrialSteps = Generator[Task, Any, None]
"""A trial: yields its tasks, receives their answers, and ends by itself. It catches its own errors."""


class MultiLora:
    """Steps its members in turns. Each goes on as soon as its own task is done."""

    def __init__(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            on_progress: called after each pass of an engine, so that long evaluations and answers do not look like a
                hang.
        """
        self.ran_out = False
        """Whether an engine, or a trial outside it, has run out of memory. The code that handles it resets it."""
        self._on_progress = on_progress
        self._members: list[Member] = []

    def __len__(self) -> int:
        return len(self._members)

    def join(self, work: TrialSteps) -> None:
        """Add a trial, which runs up to its first task here."""
        self.add(Member(work))

    def add(self, member: "Member") -> None:
        """Add a trial that has begun, unless it has ended before its first task."""
        if member.task is not None:
            self._members.append(member)

    def turn(self) -> None:
        """Run one task on each engine: the evaluations its members wait for, or else the answers, or a training pass.

        Trials that evaluate at the same time thus generate at the same time too.

        An error that an engine raises ends all members of that engine.
        """
        for engine, members in list(self._by_engine()):
            self._turn(engine, members)
        self._members = [member for member in self._members if member.task is not None]

    def end(self, error: Exception) -> None:
        """End all members with this error."""
        for member in self._members:
            member.fail(error)
        self._members.clear()

    def close(self) -> None:
        """Close all members wherever they are."""
        for member in self._members:
            member.work.close()
        self._members.clear()

    def _by_engine(self) -> Iterator[tuple[Engine, list["Member"]]]:
        """Yield each engine with its members, in the order of the members."""
        found: dict[int, tuple[Engine, list[Member]]] = {}
        for member in self._members:
            assert member.task is not None
            found.setdefault(id(member.task.engine), (member.task.engine, []))[1].append(member)
        return iter(found.values())

    def _turn(self, engine: Engine, members: Sequence["Member"]) -> None:
        evaluations = [member.task for member in members if isinstance(member.task, EvaluationBatch)]
        questions = [member.task for member in members if isinstance(member.task, GenerationBatch)]
        answers: Sequence[Any]
        try:
            if evaluations:
                done = [member for member in members if isinstance(member.task, EvaluationBatch)]
                answers = engine.evaluate(evaluations, self._on_progress)
            elif questions:
                done = [member for member in members if isinstance(member.task, GenerationBatch)]
                answers = engine.generate(questions, self._on_progress)
            else:
                done = self._train(engine, members)
                answers = [member.pending for member in done]
        except Exception as error:
            self.ran_out = self.ran_out or isinstance(error, torch.OutOfMemoryError)
            for member in members:
                member.fail(error)
        else:
            for member, answer in zip(done, answers, strict=True):
                member.go_on(answer)

    def _train(self, engine: Engine, members: Sequence["Member"]) -> list["Member"]:
        """Run one training pass on whole rows of each member's batch, as many as fit.

        Members that had no rows in the last pass come first.

        Returns:
            The members whose batches end with this pass.
        """
        left = engine.max_tokens
        spans: list[Span] = []
        taken: list[Member] = []
        for member in members:
            span = member.take(left, first=not spans)
            if span is not None:
                spans.append(span)
                taken.append(member)
                left -= engine.whole_tiles(span.num_tokens)
        pending = engine.step(spans)
        self._on_progress()
        for member in taken:
            member.pending.append(pending)
        self._members = [member for member in self._members if member not in taken] + taken
        return [member for member in taken if not member.left]


class Member:
    """A trial and the progress of its present task."""

    def __init__(self, work: TrialSteps) -> None:
        """Run the trial up to its first task. This may take a second, and may happen in any thread."""
        self.task: Task | None = None
        """None once the trial has ended."""
        self.left: list[int] = []
        """Rows of the batch that no pass has held yet."""
        self.pending: list[Pending] = []
        """Metrics of the passes so far that belong to the batch."""
        self.work = work
        self._first_token = 0
        self.go_on(None)

    def go_on(self, answer: Any) -> None:
        """Send the answer to the trial's task, and take its next task: None where the trial has ended."""
        try:
            self.task = self.work.send(answer)
        except StopIteration:
            self.task = None
        if isinstance(self.task, Batch):
            self.left, self.pending, self._first_token = list(self.task.indices), [], 0

    def take(self, max_tokens: int, first: bool) -> Span | None:
        """Take the next rows of the batch that fit into a pass; None where none does.

        Args:
            max_tokens: tokens that are left in the pass.
            first: whether the pass is empty so far. If it is, at least one row is taken.
        """
        task = self.task
        assert isinstance(task, Batch)
        fits = task.rows.fitting(self.left, max_tokens)
        rows, self.left = self.left[: max(fits, int(first))], self.left[max(fits, int(first)) :]
        if not rows:
            return None
        table = task.table if not self.left else task.table | {"applies": 0}
        span = Span(task.slot, task.rows, rows, table, self._first_token)
        self._first_token += span.num_tokens
        return span

    def fail(self, error: Exception) -> None:
        """End the trial with this error."""
        self.task = None
        with suppress(StopIteration):
            self.work.throw(error)
