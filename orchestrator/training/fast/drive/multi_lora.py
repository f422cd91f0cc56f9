"""Steps of many trials: each trial says what it needs next, and the engines do it for all of them in turn.

Trials on one engine step jointly: one pass holds rows of all of them. Trials with an engine each step separately, which
makes every figure of a trial the same bits whatever runs beside it.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.training.fast.step.engine import Engine, EvaluationBatch, Pending
from orchestrator.training.fast.step.flat_batch import Span, TokenizedRows


@dataclass(frozen=True)
class Batch:
    """One optimizer step of a slot. Its answer is the list of `Pending`s of the passes that it took."""

    engine: Engine
    slot: int
    """Of the engine."""
    rows: TokenizedRows
    indices: Sequence[int]
    table: dict[str, float]
    """The slot's values of `row.TABLE`, for the pass that ends the batch."""


Task = Batch | EvaluationBatch
"""What a trial needs next. The answer to `EvaluationBatch` is what `Engine.evaluate` measured."""

TrialSteps = Generator[Task, Any, None]
"""A trial: yields its tasks, is sent their answers, and ends by itself. Its own faults stay within it."""


class MultiLora:
    """Members that step in turn; each goes on as soon as its own task is done."""

    def __init__(self) -> None:
        self.ran_out = False
        """Whether an engine has run out of memory; whoever handles that sets it back."""
        self._members: list[Member] = []

    def __len__(self) -> int:
        return len(self._members)

    def join(self, work: TrialSteps) -> None:
        """Take a trial in: it begins here, up to its first task."""
        self.add(Member(work))

    def add(self, member: "Member") -> None:
        """Take a trial in that has begun, unless it has ended before its first task."""
        if member.task is not None:
            self._members.append(member)

    def turn(self) -> None:
        """On each engine: evaluate for all members that ask for it, or else make one pass of training.

        An error that an engine raises ends all of its members.
        """
        for engine, members in list(self._by_engine()):
            self._turn(engine, members)
        self._members = [member for member in self._members if member.task is not None]

    def end(self, error: Exception) -> None:
        """End all members by this error."""
        for member in self._members:
            member.fail(error)
        self._members.clear()

    def close(self) -> None:
        """End all members where they stand."""
        for member in self._members:
            member.work.close()
        self._members.clear()

    def _by_engine(self) -> Iterator[tuple[Engine, list["Member"]]]:
        """Each engine and its members, in the order of the members."""
        found: dict[int, tuple[Engine, list[Member]]] = {}
        for member in self._members:
            assert member.task is not None
            found.setdefault(id(member.task.engine), (member.task.engine, []))[1].append(member)
        return iter(found.values())

    def _turn(self, engine: Engine, members: Sequence["Member"]) -> None:
        asking = [member for member in members if isinstance(member.task, EvaluationBatch)]
        try:
            if asking:
                held = [member.task for member in asking if isinstance(member.task, EvaluationBatch)]
                answers: Sequence[Any] = engine.evaluate(held)
            else:
                asking = self._train(engine, members)
                answers = [member.parts for member in asking]
        except Exception as error:
            self.ran_out = self.ran_out or isinstance(error, torch.OutOfMemoryError)
            for member in members:
                member.fail(error)
        else:
            for member, answer in zip(asking, answers, strict=True):
                member.go_on(answer)

    def _train(self, engine: Engine, members: Sequence["Member"]) -> list["Member"]:
        """One pass: whole rows of each member's batch, as many as fit, those first that had none the last time.

        Returns:
            The members whose batches are done with it.
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
        for member in taken:
            member.parts.append(pending)
        self._members = [member for member in self._members if member not in taken] + taken
        return [member for member in taken if not member.left]


class Member:
    """A trial and how far its task is done."""

    def __init__(self, work: TrialSteps) -> None:
        """It begins here, up to its first task: that may take a second, in any thread."""
        self.task: Task | None = None
        self.left: list[int] = []
        self.parts: list[Pending] = []
        self.work = work
        self._first_token = 0
        self.go_on(None)

    def go_on(self, answer: Any) -> None:
        """Give the answer to its task, and take the next one: None where the trial has ended."""
        try:
            self.task = self.work.send(answer)
        except StopIteration:
            self.task = None
        if isinstance(self.task, Batch):
            self.left, self.parts, self._first_token = list(self.task.indices), [], 0

    def take(self, max_tokens: int, first: bool) -> Span | None:
        """The next rows of its batch that fit; the first of a pass takes one row at least."""
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
        """Have the trial end by this error."""
        self.task = None
        with suppress(StopIteration):
            self.work.throw(error)
