"""The cause in a failed trial's last event. It decides whether a search algorithm learns from the trial."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.errors import DivergedError, FailureCause, HubError, TooLargeError, TrialError
from orchestrator.record import SweepPaths, TrialResult, TrialState
from orchestrator.spec import parse_spec
from orchestrator.training.attempt.attempt import Attempt
from orchestrator.training.attempt.events import Event, Failed, Left
from orchestrator.training.write_queue import WriteNow


class RecordingListener:
    """A listener that stores the events."""

    stopping = False

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_step(self, step: int, total_steps: int) -> None:
        pass

    def emit(self, event: Event) -> None:
        self.events.append(event)


def last_event(error: Exception, document: dict[str, Any], folder: Path) -> Event:
    """Return the last event of a trial that meets this error as it begins."""

    def fail() -> None:
        raise error

    listener = RecordingListener()
    config = parse_spec(document).trial_config({})
    start = TrialResult(trial_id="a", state=TrialState.RUNNING, config=config, metric="eval/loss", mode="min")
    data = SimpleNamespace(fingerprint="f")
    inputs: Any = SimpleNamespace(data=data, tokenizer=None, stop_tokens=[], base=torch.nn.Module())
    attempt = Attempt(start, SweepPaths(folder).trial("a"), inputs, listener, WriteNow(), lambda _: 0.0, is_alone=True)
    assert list(attempt.run(fail)) == []
    return listener.events[-1]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DivergedError("train/loss is nan at step 3"), "diverged"),
        (TooLargeError("1 trial of rank 512 does not fit"), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (TrialError("this base has no such layer"), "configuration"),
        (HubError("the hub cannot be reached"), "infrastructure"),
    ],
)
def test_failure_names_its_cause(
    error: Exception, cause: FailureCause, document: dict[str, Any], tmp_path: Path
) -> None:
    event = last_event(error, document, tmp_path)
    assert isinstance(event, Failed)
    assert event.cause == cause


def test_outside_fault_is_not_a_failure_of_the_trial(document: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(last_event(RuntimeError("CUDA error"), document, tmp_path), Left)
