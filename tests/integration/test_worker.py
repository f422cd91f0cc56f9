"""The slots of a worker: how trials get them, release them, and continue in another attempt."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from followed_worker import SIX_STEPS, FollowedWorker
from shared_engine import COMMON, LOSS, train_alone, trial
from tiny import DEMO

from orchestrator.spec import SweepSpec, load_spec
from orchestrator.training.attempt.events import (
    Answered,
    Completed,
    Evaluated,
    Event,
    LeaseLost,
    Left,
    Logged,
    Saved,
    Warned,
)
from orchestrator.training.attempt.recorder import TrialRecorder
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.worker import slots as slots_module

pytestmark = pytest.mark.slow


def test_third_trial_waits_for_one_of_two_slots(worker: FollowedWorker, inputs: TrialInputs, tmp_path: Path) -> None:
    one = worker.start("one")
    other = worker.start("other", trial("lora.rank=4", "training.steps=4", "training.eval_steps=2", "training.seed=9"))
    assert one
    assert other
    assert worker.runtime.free_slots() == 0
    assert worker.start("third", waits=False) is None
    worker.follow(worker.has_free)
    third = worker.start("third", worker.spec.trial_config({"lora.dropout": 0.3}))
    assert third
    worker.follow(lambda: all(followed.end for followed in worker.all))
    for followed, steps, every in ((one, 6, 3), (other, 4, 2), (third, 6, 3)):
        assert isinstance(followed.end, Completed)
        assert [event.step for event in followed.of(Logged)] == list(range(1, steps + 1))
        assert [event.step for event in followed.of(Evaluated)] == [every, 2 * every]
        received = [type(event) for event in followed.of(Logged, Evaluated, Saved, Completed)]
        if followed is not other:
            assert received == [*[Logged] * 3, Evaluated, Saved] * 2 + [Completed]
            assert [event.checkpoint for event in followed.of(Saved)] == [
                f"checkpoints/checkpoint-{step}" for step in (3, 6)
            ]
        assert all(earlier.seconds <= later.seconds for earlier, later in pairwise(followed.events))
        assert followed.fields["engine"] == "fast"
        assert followed.fields["total_steps"] == steps
        assert "not_packed_reason" not in followed.fields
        best = followed.of(Evaluated)[-1].adapter
        assert (followed.paths.root / best / "adapter_model.safetensors").is_file()
    for followed in (one, third):
        solo = train_alone(inputs, tmp_path / "alone", followed.start.config)
        losses = {event.step: event.values["train/loss"] for event in followed.of(Logged)}
        assert losses == pytest.approx(solo.losses, abs=LOSS)
        for event in followed.of(Evaluated):
            assert event.values["eval/loss"] == pytest.approx(solo.evaluations[event.step]["eval/loss"], abs=LOSS)


@pytest.mark.usefixtures("joint")
def test_trials_started_first_make_their_first_step_together(
    worker_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of trials needs another graph capture."""
    worker = FollowedWorker(tmp_path / "sweep", worker_spec, inputs.data, slots=3)
    step, sizes = Engine.step, []

    def counted(engine: Engine, spans: Any) -> Any:
        sizes.append(len(spans))
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", counted)
    for name in ("one", "other", "third"):
        assert worker.start(name)
    worker.follow(lambda: all(followed.end for followed in worker.all))
    assert sizes == [3] * 6
    worker.close()


@pytest.mark.usefixtures("joint")
def test_trials_that_evaluate_together_answer_in_one_batch(
    inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin together, and evaluate after three and after six steps."""
    asks = ["evaluation={metrics: [exact_match], rows: 4, max_new_tokens: 3}", "search.metric=eval/exact_match"]
    space = "search.space={lora.rank: {choice: [4, 8]}}"
    worker = FollowedWorker(
        tmp_path / "sweep", load_spec(DEMO, [*COMMON, *SIX_STEPS, *asks, "scheduler.kind=none", space]), inputs.data
    )
    generate, sizes = Engine.generate, []

    def counted(engine: Engine, batches: Any, *rest: Any) -> Any:
        sizes.append(len(batches))
        return generate(engine, batches, *rest)

    monkeypatch.setattr(Engine, "generate", counted)
    for rank in (4, 8):
        assert worker.start(f"rank-{rank}", worker.spec.trial_config({"lora.rank": rank}))
    worker.follow(lambda: all(followed.end for followed in worker.all))
    worker.close()
    assert sizes == [2, 2]
    for followed in worker.all:
        assert isinstance(followed.end, Completed)
        assert [event.values["eval/exact_match"] for event in followed.of(Evaluated)] == [0.0, 0.0]
        assert 0 < followed.fields["generated_tokens"] <= 2 * 4 * 3
        assert followed.fields["generation_s"] > 0


def test_best_adapter_answers_while_others_wait(worker: FollowedWorker, inputs: TrialInputs, tmp_path: Path) -> None:
    """The best adapter is read back from disk once it is written."""
    asks = ["evaluation={metrics: [exact_match], rows: 4, max_new_tokens: 3}", "training.learning_rate=3e-2"]
    answering = worker.start("answering", trial(*SIX_STEPS, *asks))
    other = worker.start("other", worker.config(steps=12))
    assert answering
    assert other
    worker.follow(lambda: answering.end and other.end)
    received = [type(event) for event in answering.of(Saved, Answered, Completed)]
    assert received == [Saved, Saved, Answered, Completed]
    assert answering.of(Answered)[0].values.keys() == {"eval/exact_match", "eval/exact_match_stderr"}
    solo = train_alone(inputs, tmp_path / "alone", other.start.config)
    losses = {event.step: event.values["train/loss"] for event in other.of(Logged)}
    assert losses == pytest.approx(solo.losses, abs=LOSS)


def test_released_trial_ends_and_frees_its_slot(worker: FollowedWorker) -> None:
    long = worker.start("long", worker.config(steps=500))
    other = worker.start("other")
    assert long
    assert other
    worker.follow(lambda: long.of(Logged))
    worker.runtime.release(long.lease)
    worker.follow(lambda: long.end and other.end)
    assert isinstance(long.end, Left)
    assert long.end.lost is None
    assert 1 <= long.end.step < 500
    assert isinstance(other.end, Completed)
    worker.follow(lambda: worker.runtime.free_slots() == 2)


def test_trial_continues_from_its_checkpoint(worker: FollowedWorker) -> None:
    whole, left = worker.start("whole"), worker.start("left")
    assert whole
    assert left
    recorder = TrialRecorder(left.start, left.paths, worker.spec)
    worker.follow(lambda: left.of(Saved))
    worker.runtime.release(left.lease)
    worker.follow(lambda: left.end and whole.end)
    for event in left.events:
        recorder.record(event)
        if isinstance(event, Saved):
            break
    again = worker.start("left", again=True)
    assert again
    assert again.start.step == 3
    worker.follow(lambda: again.end)
    assert isinstance(again.end, Completed)
    losses = {event.step: event.values["train/loss"] for event in again.of(Logged)}
    expected = {event.step: event.values["train/loss"] for event in whole.of(Logged) if event.step > 3}
    assert losses == pytest.approx(expected, abs=2e-6)


def test_trial_without_remaining_steps_ends_at_once(worker: FollowedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gets no task from it, and the worker continues."""
    step, sent = Engine.step, []

    def counted_step(engine: Engine, spans: Any) -> Any:
        sent.append(len(spans))
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", counted_step)
    one = worker.start("one")
    assert one
    worker.follow(lambda: one.end)
    recorder = TrialRecorder(one.start, one.paths, worker.spec)
    for event in one.events[:-1]:
        recorder.record(event)
    last = {"seconds": 1.0, "gpu_seconds": 0.0, "peak_memory_gib": 0.0}
    recorder.record(Warned(**last, warning="before the checkpoint to continue from"))
    recorder.record(Left(**last, step=6, lost=None))
    again = worker.start("one", again=True)
    assert again
    assert again.start.step == again.start.total_steps == 6
    assert again.start.warnings == ["before the checkpoint to continue from"]
    worker.follow(lambda: again.end)
    assert isinstance(again.end, Completed)
    assert not again.of(Logged)
    after = worker.start("after")
    assert after
    worker.follow(lambda: after.end)
    assert isinstance(after.end, Completed)
    assert sent == [1] * 12


def test_new_lease_on_a_trial_ends_the_earlier_one(worker: FollowedWorker) -> None:
    """The earlier recording process is gone, and has not released its lease."""
    one = worker.start("one", worker.config(steps=5000))
    assert one
    worker.follow(lambda: one.of(Logged))
    again = worker.start("one")
    assert again
    worker.follow(lambda: one.end and again.end)
    assert isinstance(one.end, Left)
    assert one.end.lost is None
    assert isinstance(again.end, Completed)


def test_lease_expires_when_nobody_asks_for_it(worker: FollowedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = worker.start("heard")
    assert heard
    worker.follow(lambda: heard.of(Logged))  # the base is loaded
    forever = worker.config(steps=5000)
    unheard = worker.start("unheard", forever)
    assert unheard
    worker.follow(lambda: heard.end, unheard)
    renewed = worker.start("renewed", forever)
    assert renewed
    monkeypatch.setattr(slots_module, "LEASE_TIMEOUT_S", 5.0)
    deadline = time.monotonic() + 200
    while not worker.has_free():
        worker.runtime.renew(renewed.lease)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker.follow(lambda: len(renewed.of(Logged)) > 2, unheard)
    assert renewed.end is None
    events: list[Event] = []
    while not (events and isinstance(events[-1], Left)):  # the event may come after the slot is free
        assert time.monotonic() < deadline
        events += worker.runtime.events(unheard.lease, 1.0)
    assert events[-1].lost is None
    time.sleep(5.1)
    worker.runtime.start("new", renewed.start, worker.paths.trial("new"))
    with pytest.raises(LeaseLost, match="is unknown here"):
        worker.runtime.events(unheard.lease, 0.0)
    worker.runtime.release("new")
