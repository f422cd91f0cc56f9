"""Errors in a worker: which trials they end, and that others continue."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from followed_worker import FollowedWorker
from shared_engine import LOSS, train_alone, trial

from orchestrator.spec import SweepSpec
from orchestrator.training.attempt.events import (
    Completed,
    Failed,
    LeaseLost,
    Left,
    Logged,
    Saved,
)
from orchestrator.training.attempt.recorder import TrialRecorder
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.slot import Slot
from orchestrator.training.fast.step.engine import CPU_TOKENS, Engine
from orchestrator.training.worker import runtime as runtime_module

pytestmark = pytest.mark.slow


def test_error_while_the_trainer_is_imported_is_reported(
    worker_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_started = threading.Event()

    def fails() -> None:
        assert has_started.wait(60)
        raise ImportError("no trainer")

    monkeypatch.setattr(runtime_module, "import_trainer", fails)  # before the worker starts, which imports at once
    worker = FollowedWorker(tmp_path / "sweep", worker_spec, inputs.data)
    one = worker.start("one")
    assert one
    has_started.set()
    worker.follow(lambda: one.end)
    assert isinstance(one.end, Left)
    assert one.end.lost == "ImportError: no trainer"
    with pytest.raises(LeaseLost, match="no trainer"):
        worker.runtime.start("other", one.start, one.paths)


@pytest.mark.parametrize("place", ["adapters", "checkpoints"])
def test_write_error_ends_only_that_trial(worker: FollowedWorker, place: str) -> None:
    sound = worker.start("sound")
    broken = worker.start("broken", worker.config(steps=5000))
    assert sound
    assert broken
    (broken.paths.root / place).write_text("no folder")
    worker.follow(lambda: sound.end and broken.end)
    assert isinstance(sound.end, Completed)
    assert isinstance(broken.end, Left)
    assert broken.end.lost is not None
    assert broken.end.lost.startswith(("FileExistsError", "NotADirectoryError"))
    assert not broken.of(Saved)
    worker.follow(lambda: worker.runtime.free_slots() == 2)
    after = worker.start("after")
    assert after
    worker.follow(lambda: after.end)
    assert isinstance(after.end, Completed)


def failure_beside_a_sound_trial(worker: FollowedWorker, *overrides: str) -> Failed:
    """Run a trial with these overrides beside a sound one. Only the sound one completes."""
    sound, wrong = worker.start("sound"), worker.start("wrong", trial(*overrides))
    assert sound
    assert wrong
    worker.follow(lambda: sound.end and wrong.end)
    assert isinstance(sound.end, Completed)
    assert isinstance(wrong.end, Failed)
    return wrong.end


def test_diverging_trial_fails_alone(worker: FollowedWorker) -> None:
    failed = failure_beside_a_sound_trial(worker, "training.learning_rate=1e30", "training.max_grad_norm=0")
    assert "at step" in failed.error
    assert failed.traceback is None


def test_trial_with_unknown_layers_fails_alone(worker: FollowedWorker) -> None:
    assert "w_proj" in failure_beside_a_sound_trial(worker, "lora.target_modules=[w_proj]").error


@pytest.mark.usefixtures("joint")
def test_engine_error_ends_all_attempts_and_new_trials_may_start(
    worker: FollowedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = Engine.step, 0

    def faulty(engine: Engine, spans: Any) -> Any:
        nonlocal done
        done += 1
        if done == 4:
            raise RuntimeError("the device is gone")
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", faulty)
    pair = worker.start("one"), worker.start("other")
    worker.follow(lambda: all(followed and followed.end for followed in pair))
    for followed in pair:
        assert followed
        assert isinstance(followed.end, Left)
        assert followed.end.lost == "RuntimeError: the device is gone"
    worker.follow(lambda: worker.runtime.free_slots() == 2)
    after = worker.start("after")
    assert after
    worker.follow(lambda: after.end)
    assert isinstance(after.end, Completed)


@pytest.mark.usefixtures("joint")
def test_after_running_out_of_memory_trials_continue_on_an_engine_that_takes_less(
    worker_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes a trial that was being set up for the same engine."""
    worker = FollowedWorker(tmp_path / "sweep", worker_spec, inputs.data, slots=3)
    step, should_fail, has_failed, raised = Engine.step, threading.Event(), threading.Event(), 0

    def faulty(engine: Engine, spans: Any) -> Any:
        nonlocal raised
        if should_fail.is_set() and not raised:
            raised = len(spans)
            has_failed.set()
            while not worker.runtime._num_set_up:
                time.sleep(0.001)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", faulty)
    # At a high learning rate, two runs in float32 differ by more than the bound.
    config = worker.config(steps=60, learning_rate=2e-4)
    names = ("one", "other", "third")
    for name in names[:2]:
        assert worker.start(name, config)
    worker.follow(lambda: all(followed.of(Saved) for followed in worker.all))
    should_fail.set()
    assert has_failed.wait(60)
    assert worker.start(names[2], config)
    worker.follow(lambda: all(followed.end for followed in worker.all))
    assert raised == 2
    for followed in worker.all:
        assert isinstance(followed.end, Left)
        assert followed.end.lost
        assert followed.end.lost.startswith("OutOfMemoryError")
        recorder = TrialRecorder(followed.start, followed.paths, worker.spec)
        for event in followed.events:
            recorder.record(event)
    plan = {"keeps_base": True, "recompute": "nothing", "max_tokens": CPU_TOKENS}
    assert [followed.fields["memory_plan"] for followed in worker.all] == [plan] * 3
    before = [worker.all.pop() for _ in names][::-1]
    for name in names:
        assert worker.start(name, config, again=True)
    assert [followed.start.step > 0 for followed in worker.all] == [True, True, False]
    worker.follow(lambda: all(followed.end for followed in worker.all))
    solo = train_alone(inputs, tmp_path / "alone", config)
    for followed, earlier in zip(worker.all, before, strict=True):
        assert isinstance(followed.end, Completed)
        assert followed.fields["memory_plan"] == plan | {"recompute": "elementwise"}
        losses = {event.step: event.values["train/loss"] for event in earlier.of(Logged) + followed.of(Logged)}
        assert losses == pytest.approx(solo.losses, abs=LOSS)
    worker.close()


@pytest.mark.usefixtures("joint")
def test_a_trial_that_always_runs_out_of_memory_as_it_is_set_up_has_less_each_time_and_then_fails(
    worker_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the passes of the engine, which notice it by themselves."""

    def begin(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Slot, "begin", begin)
    training = worker_spec.training.model_copy(update={"engine": "fast", "recompute": True})
    spec = worker_spec.model_copy(update={"training": training})
    worker, kept = FollowedWorker(tmp_path / "sweep", spec, inputs.data), list[bool]()
    for number in range(8):
        followed = worker.start("one", again=number > 0)
        assert followed
        worker.follow(lambda followed=followed: followed.end)  # type: ignore[misc]
        if isinstance(followed.end, Failed):
            break
        assert isinstance(followed.end, Left)
        assert followed.end.is_memory
        kept.append(followed.fields["memory_plan"]["keeps_base"])
    assert isinstance(followed.end, Failed), "endless"
    assert followed.end.cause == "out_of_memory"
    assert followed.end.error.startswith("1 trial of rank 8 with rows of up to ")
    assert "ran out of memory with recompute=layers and passes of" in followed.end.error
    assert kept == [True, False, True, False], "in the pack, then alone"
    worker.close()
