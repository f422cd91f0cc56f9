"""The cause in a failed trial's last event. It decides whether a search algorithm learns from the trial."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.errors import DivergedError, FailureCause, HubError, TooLargeError, TrialError
from orchestrator.record import SweepPaths, TrialResult, TrialState
from orchestrator.spec import parse_spec
from orchestrator.training.attempt import attempt as module
from orchestrator.training.attempt.attempt import Attempt
from orchestrator.training.attempt.events import Event, Failed, Left
from orchestrator.training.engines.memory_limits import MemoryLimits
from orchestrator.training.write_queue import WriteNow


class RecordingListener:
    """A listener that stores the events."""

    stopping = False

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_step(self, step: int, total_steps: int) -> None:
        pass

    def on_progress(self) -> None:
        pass

    def emit(self, event: Event) -> None:
        self.events.append(event)


def last_event(
    error: Exception, document: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, has_engine: bool = False
) -> Event:
    """Return the last event of a trial that meets this error as it looks for its engine, or as it opens it."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(module, "engine_fields", fail)
    listener = RecordingListener()
    config = parse_spec(document).trial_config({})
    start = TrialResult(trial_id="a", state=TrialState.RUNNING, config=config, metric="eval/loss", mode="min")
    data = SimpleNamespace(fingerprint="f")
    inputs: Any = SimpleNamespace(data=data, tokenizer=None, stop_tokens=[], base=torch.nn.Module())
    paths, limits = SweepPaths(folder).trial("a"), MemoryLimits()
    attempt = Attempt(start, paths, inputs, listener, WriteNow(), lambda _: 0.0, limits)
    assert list(attempt.run((lambda: None) if has_engine else fail)) == []
    return listener.events[-1]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DivergedError("train/loss is nan at step 3"), "diverged"),
        (TooLargeError("1 trial of rank 512 does not fit"), "out_of_memory"),
        (TrialError("this base has no such layer"), "configuration"),
        (HubError("the hub cannot be reached"), "infrastructure"),
    ],
)
def test_failure_names_its_cause(
    error: Exception,
    cause: FailureCause,
    document: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    event = last_event(error, document, tmp_path, monkeypatch)
    assert isinstance(event, Failed)
    assert event.cause == cause


def test_outside_fault_is_not_a_failure_of_the_trial(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(last_event(RuntimeError("CUDA error"), document, tmp_path, monkeypatch), Left)


def test_trial_that_runs_out_of_memory_leaves_until_no_smaller_form_is_left(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    document["training"] = {"batch_size": 2}
    event = last_event(error, document, tmp_path, monkeypatch, has_engine=True)
    assert isinstance(event, Left)
    assert event.is_memory
    document["training"] = {"batch_size": 1}
    event = last_event(error, document, tmp_path, monkeypatch, has_engine=True)
    assert isinstance(event, Failed)
    assert event.cause == "out_of_memory"
    assert event.error == "out of GPU memory with one row in a forward pass: CUDA out of memory"


def test_memory_that_is_out_before_there_is_an_engine_is_not_blamed_on_the_rows(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document["training"] = {"batch_size": 2}
    event = last_event(torch.OutOfMemoryError("CUDA out of memory"), document, tmp_path, monkeypatch)
    assert isinstance(event, Failed)
    assert event.cause == "out_of_memory"
    assert event.error == "out of GPU memory before the trial had an engine: CUDA out of memory"


def test_limits_hold_for_trials_that_take_the_same_memory(document: dict[str, Any]) -> None:
    spec = parse_spec(document | {"training": {"batch_size": 6}})
    limits, config = MemoryLimits(), spec.trial_config({})
    sizes = []
    while limits.lower(config, None):
        sizes.append(limits.micro_batch(config))
    assert sizes == [3, 1]
    for section, values, rows in (
        ("training", {"learning_rate": 1e-3, "seed": 7}, 1),
        ("lora", {"alpha": 3.0}, 1),
        ("lora", {"rank": 64}, 6),
        ("training", {"optimizer": "adamw_torch"}, 6),
    ):
        changed = getattr(config, section).model_copy(update=values)
        assert limits.micro_batch(config.model_copy(update={section: changed})) == rows
