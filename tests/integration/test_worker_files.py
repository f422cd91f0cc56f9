"""Files that a worker writes in the background."""

import threading
import time
from pathlib import Path

import pytest
import torch
from followed_worker import SIX_STEPS, FollowedWorker
from safetensors.torch import load_file
from shared_engine import train_alone, trial

from orchestrator.record import TrialPaths
from orchestrator.training.attempt import reporter as reporter_module
from orchestrator.training.attempt.events import (
    Completed,
    Evaluated,
    Event,
    Logged,
    Noted,
    Saved,
)
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.worker import file_writers
from orchestrator.training.worker.file_writers import FileWriter
from orchestrator.training.worker.slots import SlotLease

pytestmark = pytest.mark.slow


def test_files_of_an_earlier_attempt_are_written_first() -> None:
    lease, done, gate = SlotLease("1", 0, None, TrialPaths(Path("/none"), "a")), [], threading.Event()  # type: ignore[arg-type]
    earlier = FileWriter(lease)
    later = FileWriter(lease, earlier.thread)
    later.do(lambda: done.append("later"))
    earlier.do(lambda: (gate.wait(60), done.append("earlier"))[1])
    assert not done
    gate.set()
    earlier.close()
    later.wait()
    later.close()
    assert done == ["earlier", "later"]


def hold_writers(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make all writers that are opened later wait until the returned event is set."""
    gate = threading.Event()

    class HeldWriter(FileWriter):
        def __init__(self, lease: SlotLease, earlier: threading.Thread | None) -> None:
            super().__init__(lease, earlier)
            self.do(lambda: (gate.wait(300), None)[1])

    monkeypatch.setattr(file_writers, "FileWriter", HeldWriter)
    return gate


@pytest.mark.parametrize("runs_alone", [False, True])
def test_files_written_late_are_complete(
    worker: FollowedWorker, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_alone: bool
) -> None:
    """Files are written and reported after the trial has left its slot, and another attempt continues from them."""
    gate = hold_writers(monkeypatch)
    one = worker.start("one", trial(*SIX_STEPS, "lora.rank=32") if runs_alone else None)
    assert one
    received: list[Event] = []
    deadline = time.monotonic() + 200
    while not (received if runs_alone else worker.runtime.free_slots() == 2):
        assert time.monotonic() < deadline
        received += worker.runtime.events(one.lease, 0.02)
    if runs_alone:  # it keeps its slot until its files are written; this gives it time to train as far as it can
        received += worker.runtime.events(one.lease, 4.0)
    assert [event.fields.keys() for event in received if isinstance(event, Noted)] == [
        {"not_packed_reason"}
    ] * runs_alone
    assert not (one.paths.root / "adapters").exists()
    gate.set()
    worker.follow(lambda: one.end)
    assert isinstance(one.end, Completed), one.end
    for step in (3, 6):
        assert (one.paths.checkpoints / f"checkpoint-{step}" / "optimizer.pt").is_file()
    for folder in (one.paths.adapter(6), one.paths.checkpoints / "checkpoint-6"):
        assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 7 * 4, "a matrix is missing"
    solo = train_alone(inputs, tmp_path / "alone", one.start.config, one.paths.checkpoints / "checkpoint-3")
    losses = {event.step: event.values["train/loss"] for event in one.of(Logged) if event.step > 3}
    assert losses == pytest.approx(solo.losses, abs=2e-6)


def test_adapter_written_late_has_the_weights_of_its_step(
    worker: FollowedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if SFTTrainer's optimizer has continued meanwhile and changed the model's tensors."""
    gate = hold_writers(monkeypatch)
    one = worker.start("one", trial(*SIX_STEPS, "training.engine=trl"))
    assert one
    deadline = time.monotonic() + 200
    while worker.runtime.free_slots() < 2 and time.monotonic() < deadline:
        worker.runtime.renew(one.lease)
        time.sleep(0.02)
    gate.set()
    worker.follow(lambda: one.end)
    assert isinstance(one.end, Completed), one.end
    for step in (3, 6):
        late, saved = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (one.paths.adapter(step), one.paths.checkpoints / f"checkpoint-{step}")
        )
        assert late.keys() == saved.keys()
        assert all(torch.equal(late[name], saved[name]) for name in saved)


@pytest.mark.parametrize(("apart_s", "steps"), [(60.0, []), (0.0, [3, 6])])
def test_without_save_steps_checkpoints_are_some_time_apart(
    worker: FollowedWorker, monkeypatch: pytest.MonkeyPatch, apart_s: float, steps: list[int]
) -> None:
    monkeypatch.setattr(reporter_module, "SAVE_EVERY_S", apart_s)
    one = worker.start("one", worker.config(save_steps=None))
    assert one
    worker.follow(lambda: one.end)
    assert isinstance(one.end, Completed)
    assert [event.step for event in one.of(Saved)] == steps
    assert [event.saves for event in one.of(Evaluated)] == [bool(steps)] * 2
