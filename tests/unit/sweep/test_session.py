import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orchestrator.errors import TrialError
from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.spec import parse_spec
from orchestrator.sweep.session import TrialSession

TOTAL, EVERY = 6, 2

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def result(document: dict[str, Any]) -> TrialResult:
    config = parse_spec(document).trial_config({})
    return TrialResult(trial_id="a", state=TrialState.COMPLETE, config=config, metric="eval/loss", mode="min")


class Training:
    """Six steps with an evaluation every second one, as the training loop reports them; counts its steps."""

    def __init__(self, result: TrialResult | None = None, error: BaseException | None = None) -> None:
        self.steps = 0
        self.ended = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self._result = result
        self._error = error

    def __call__(self, session: Any) -> TrialResult | None:
        try:
            while self.steps < TOTAL:
                self.hold.wait()
                self.steps += 1
                if self._error and self.steps == 3:
                    raise self._error
                if not session.on_step(self.steps, TOTAL):
                    return None
                if self.steps % EVERY == 0 and not session.on_report(_point(self.steps)):
                    return None
            return self._result
        finally:
            self.ended.set()


def test_evaluations_come_one_at_a_time_and_the_last_with_the_result(result: TrialResult) -> None:
    training = Training(result)
    with _session(training) as session:
        for step in (2, 4):
            assert session.next() == _point(step)
            assert training.steps == step
            assert not training.ended.wait(0.05), "the training waits"
            assert training.steps == step
        assert session.next() is result
        assert training.steps == TOTAL
        assert training.ended.is_set()


def test_stop_ends_a_trial_that_waits(result: TrialResult) -> None:
    training = Training(result)
    with _session(training) as session:
        assert session.next() == _point(2)
        session.stop()
        assert training.ended.is_set()
        assert training.steps == 2
        with pytest.raises(RuntimeError, match="stopped"):
            session.next()


def test_stop_ends_a_trial_between_evaluations_at_its_next_step(result: TrialResult) -> None:
    training = Training(result)
    training.hold.clear()
    with _session(training) as session:
        stopper = threading.Thread(target=session.stop)
        stopper.start()
        stopper.join(0.05)
        assert stopper.is_alive(), "stop waits for the end"
        training.hold.set()
        stopper.join()
        assert training.ended.is_set()
        assert training.steps == 1


def test_stop_before_the_first_evaluation_is_asked_for(result: TrialResult) -> None:
    training = Training(result)
    with _session(training) as session:
        while training.steps < 2:
            pass
        session.stop()
        assert training.ended.is_set()
        assert training.steps == 2


def test_stop_after_the_end_and_twice(result: TrialResult) -> None:
    with _session(Training(result)) as session:
        assert [_step_of(session.next()) for _ in range(3)] == [2, 4, "result"]
        session.stop()
        session.stop()


@pytest.mark.parametrize(
    "error", [TrialError("no such module", "remedy"), RuntimeError("lost"), KeyboardInterrupt(), SystemExit(3)]
)
def test_the_trials_error_is_raised_in_next(error: BaseException) -> None:
    with _session(Training(error=error)) as session:
        assert session.next() == _point(2)
        with pytest.raises(type(error)) as caught:
            session.next()
        assert caught.value is error


def _point(step: int) -> MetricPoint:
    return MetricPoint(step=step, tokens=step * 10, time_s=step, values={"eval/loss": 1 / step})


def _step_of(event: MetricPoint | TrialResult) -> int | str:
    return event.step if isinstance(event, MetricPoint) else "result"


@contextmanager
def _session(run: Callable[[Any], TrialResult | None]) -> Iterator[TrialSession]:
    """A session whose thread does not outlive the test."""
    session = TrialSession(run)
    try:
        yield session
    finally:
        session.stop()
