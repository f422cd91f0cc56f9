"""The host of a pack: who gets a slot, what is told of it, and what becomes of those that cannot share or break."""

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOSTED, Followed, Hosted
from packed import COMMON, LOSS, alone, open_inputs, trial
from safetensors.torch import load_file
from tiny import DEMO

from orchestrator.spec import SweepSpec, load_spec
from orchestrator.training.attempt import reporter as reporter_module
from orchestrator.training.attempt.events import (
    Answered,
    Completed,
    Evaluated,
    Event,
    Failed,
    LeaseLost,
    Left,
    Logged,
    Noted,
    Saved,
    Warned,
)
from orchestrator.training.attempt.recorder import TrialRecorder
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.step.engine import CPU_TOKENS, Engine
from orchestrator.training.worker import compatibility, file_writers
from orchestrator.training.worker import runtime as runtime_module
from orchestrator.training.worker import slots as slots_module
from orchestrator.training.worker.file_writers import FileWriter
from orchestrator.training.worker.slots import SlotLease

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs() -> TrialInputs:
    return open_inputs()


@pytest.fixture(scope="module")
def hosted_spec() -> SweepSpec:
    space = "search.space={lora.rank: {choice: [4, 8]}, lora.dropout: {choice: [0.1, 0.3]}}"
    return load_spec(DEMO, [*COMMON, *HOSTED, space, "search.num_trials=4"])


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials step jointly, as they do on a GPU."""
    monkeypatch.setattr(compatibility, "steps_separately", lambda _: False)


@pytest.fixture
def hosted(hosted_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path) -> Iterator[Hosted]:
    made = Hosted(tmp_path / "sweep", hosted_spec, inputs.data)
    yield made
    made.close()


def test_a_third_trial_waits_for_one_of_two_slots(hosted: Hosted, inputs: TrialInputs, tmp_path: Path) -> None:
    one = hosted.start("one")
    other = hosted.start("other", trial("lora.rank=4", "training.steps=4", "training.eval_steps=2", "training.seed=9"))
    assert one
    assert other
    assert hosted.host.free_slots() == 0
    assert hosted.start("third", waits=False) is None
    hosted.follow(hosted.has_free)
    third = hosted.start("third", hosted.spec.trial_config({"lora.dropout": 0.3}))
    assert third
    hosted.follow(lambda: all(followed.end for followed in hosted.all))
    for followed, steps, every in ((one, 6, 3), (other, 4, 2), (third, 6, 3)):
        assert isinstance(followed.end, Completed)
        assert [event.step for event in followed.of(Logged)] == list(range(1, steps + 1))
        assert [event.step for event in followed.of(Evaluated)] == [every, 2 * every]
        told = [type(event) for event in followed.of(Logged, Evaluated, Saved, Completed)]
        if followed is not other:
            assert told == [*[Logged] * 3, Evaluated, Saved] * 2 + [Completed]
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
        solo = alone(inputs, tmp_path / "alone", followed.start.config)
        losses = {event.step: event.values["train/loss"] for event in followed.of(Logged)}
        assert losses == pytest.approx(solo.losses, abs=LOSS)
        for event in followed.of(Evaluated):
            assert event.values["eval/loss"] == pytest.approx(solo.evaluations[event.step]["eval/loss"], abs=LOSS)


@pytest.mark.usefixtures("joint")
def test_trials_that_come_at_the_start_begin_together(
    hosted_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size of a pack is a graph to capture."""
    hosted = Hosted(tmp_path / "sweep", hosted_spec, inputs.data, slots=3)
    step, sizes = Engine.step, []

    def noted(engine: Engine, spans: Any) -> Any:
        sizes.append(len(spans))
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", noted)
    for name in ("one", "other", "third"):
        assert hosted.start(name)
    hosted.follow(lambda: all(followed.end for followed in hosted.all))
    assert sizes == [3] * 6
    hosted.close()


def test_a_fault_as_a_trainer_is_imported_is_told(
    hosted_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_started = threading.Event()

    def fails() -> None:
        assert has_started.wait(60)
        raise ImportError("no trainer")

    monkeypatch.setattr(runtime_module, "import_trainer", fails)  # before the host stands: it imports at once
    hosted = Hosted(tmp_path / "sweep", hosted_spec, inputs.data)
    one = hosted.start("one")
    assert one
    has_started.set()
    hosted.follow(lambda: one.end)
    assert isinstance(one.end, Left)
    assert one.end.lost == "ImportError: no trainer"
    with pytest.raises(LeaseLost, match="no trainer"):
        hosted.host.start("other", one.start, one.paths)


def test_an_earlier_attempts_files_come_first() -> None:
    lease, done, gate = SlotLease(0, None, None), [], threading.Event()  # type: ignore[arg-type]
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
    """Those to come write nothing until this is set."""
    gate = threading.Event()

    class Held(FileWriter):
        def __init__(self, lease: SlotLease, earlier: threading.Thread | None) -> None:
            super().__init__(lease, earlier)
            self.do(lambda: (gate.wait(300), None)[1])

    monkeypatch.setattr(file_writers, "FileWriter", Held)
    return gate


@pytest.mark.parametrize("runs_alone", [False, True])
def test_what_is_written_late_is_whole(
    hosted: Hosted, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_alone: bool
) -> None:
    """Files are written, and told of, after the trial has left its slot; and another attempt goes on from them."""
    gate = hold_writers(monkeypatch)
    one = hosted.start("one", trial(*HOSTED, "lora.rank=32") if runs_alone else None)
    assert one
    told: list[Event] = []
    deadline = time.monotonic() + 200
    while not (told if runs_alone else hosted.host.free_slots() == 2):
        assert time.monotonic() < deadline
        told += hosted.host.events(one.lease, 0.02)
    if runs_alone:  # it keeps its slot until its files are written: it has time to train as far as it can
        told += hosted.host.events(one.lease, 4.0)
    assert [event.fields.keys() for event in told if isinstance(event, Noted)] == [{"not_packed_reason"}] * runs_alone
    assert not (one.paths.root / "adapters").exists()
    gate.set()
    hosted.follow(lambda: one.end)
    assert isinstance(one.end, Completed), one.end
    for step in (3, 6):
        assert (one.paths.checkpoints / f"checkpoint-{step}" / "optimizer.pt").is_file()
    for folder in (one.paths.adapter(6), one.paths.checkpoints / "checkpoint-6"):
        assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 7 * 4, "a matrix is missing"
    solo = alone(inputs, tmp_path / "alone", one.start.config, one.paths.checkpoints / "checkpoint-3")
    losses = {event.step: event.values["train/loss"] for event in one.of(Logged) if event.step > 3}
    assert losses == pytest.approx(solo.losses, abs=2e-6)


def test_an_adapter_that_is_written_late_has_the_weights_of_its_step(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where SFTTrainer's optimizer has gone on meanwhile, in the tensors of the model itself."""
    gate = hold_writers(monkeypatch)
    one = hosted.start("one", trial(*HOSTED, "training.engine=trl"))
    assert one
    deadline = time.monotonic() + 200
    while hosted.host.free_slots() < 2 and time.monotonic() < deadline:
        hosted.host.renew(one.lease)
        time.sleep(0.02)
    gate.set()
    hosted.follow(lambda: one.end)
    assert isinstance(one.end, Completed), one.end
    for step in (3, 6):
        late, saved = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (one.paths.adapter(step), one.paths.checkpoints / f"checkpoint-{step}")
        )
        assert late.keys() == saved.keys()
        assert all(torch.equal(late[name], saved[name]) for name in saved)


@pytest.mark.parametrize(("apart_s", "steps"), [(60.0, []), (0.0, [3, 6])])
def test_checkpoints_are_some_time_apart_unless_asked_for_by_steps(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch, apart_s: float, steps: list[int]
) -> None:
    monkeypatch.setattr(reporter_module, "SAVE_EVERY_S", apart_s)
    one = hosted.start("one", hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, save_steps=None)))
    assert one
    hosted.follow(lambda: one.end)
    assert isinstance(one.end, Completed)
    assert [event.step for event in one.of(Saved)] == steps
    assert [event.saves for event in one.of(Evaluated)] == [bool(steps)] * 2


def test_the_best_adapter_answers_while_others_wait(hosted: Hosted, inputs: TrialInputs, tmp_path: Path) -> None:
    """With the best adapter, read back from disk once it is written."""
    asks = ["evaluation={metrics: [exact_match], rows: 4, max_new_tokens: 3}", "training.learning_rate=3e-2"]
    answering = hosted.start("answering", trial(*HOSTED, *asks))
    other = hosted.start("other", hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, steps=12)))
    assert answering
    assert other
    hosted.follow(lambda: answering.end and other.end)
    told = [type(event) for event in answering.of(Saved, Answered, Completed)]
    assert told == [Saved, Saved, Answered, Completed]
    assert answering.of(Answered)[0].values.keys() == {"eval/exact_match"}
    solo = alone(inputs, tmp_path / "alone", other.start.config)
    losses = {event.step: event.values["train/loss"] for event in other.of(Logged)}
    assert losses == pytest.approx(solo.losses, abs=LOSS)


def test_a_released_lease_leaves_and_frees_its_slot(hosted: Hosted) -> None:
    long = hosted.start("long", hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, steps=500)))
    other = hosted.start("other")
    assert long
    assert other
    hosted.follow(lambda: long.of(Logged))
    hosted.host.release(long.lease)
    hosted.follow(lambda: long.end and other.end)
    assert isinstance(long.end, Left)
    assert long.end.lost is None
    assert 1 <= long.end.step < 500
    assert isinstance(other.end, Completed)
    hosted.follow(lambda: hosted.host.free_slots() == 2)


def test_a_trial_that_was_left_goes_on_from_its_checkpoint(hosted: Hosted) -> None:
    whole, left = hosted.start("whole"), hosted.start("left")
    assert whole
    assert left
    recorder = TrialRecorder(left.start, left.paths, hosted.spec)
    hosted.follow(lambda: left.of(Saved))
    hosted.host.release(left.lease)
    hosted.follow(lambda: left.end and whole.end)
    for event in left.events:
        recorder.record(event)
        if isinstance(event, Saved):
            break
    again = hosted.start("left", again=True)
    assert again
    assert again.start.step == 3
    hosted.follow(lambda: again.end)
    assert isinstance(again.end, Completed)
    losses = {event.step: event.values["train/loss"] for event in again.of(Logged)}
    expected = {event.step: event.values["train/loss"] for event in whole.of(Logged) if event.step > 3}
    assert losses == pytest.approx(expected, abs=2e-6)


def test_a_trial_whose_steps_are_all_done_ends_at_once(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no task: nothing is asked of the engine, and the host goes on."""
    step, sent = Engine.step, []

    def watched_step(engine: Engine, spans: Any) -> Any:
        sent.append(len(spans))
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", watched_step)
    one = hosted.start("one")
    assert one
    hosted.follow(lambda: one.end)
    recorder = TrialRecorder(one.start, one.paths, hosted.spec)
    for event in one.events[:-1]:
        recorder.record(event)
    last = {"seconds": 1.0, "gpu_seconds": 0.0, "peak_memory_gib": 0.0}
    recorder.record(Warned(**last, warning="before the checkpoint from which it goes on"))
    recorder.record(Left(**last, step=6, lost=None))
    again = hosted.start("one", again=True)
    assert again
    assert again.start.step == again.start.total_steps == 6
    assert again.start.warnings == ["before the checkpoint from which it goes on"]
    hosted.follow(lambda: again.end)
    assert isinstance(again.end, Completed)
    assert not again.of(Logged)
    after = hosted.start("after")
    assert after
    hosted.follow(lambda: after.end)
    assert isinstance(after.end, Completed)
    assert sent == [1] * 12


def test_a_new_lease_on_a_trial_ends_the_earlier_one(hosted: Hosted) -> None:
    """Its relay is gone, and did not say so."""
    one = hosted.start("one", hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, steps=5000)))
    assert one
    hosted.follow(lambda: one.of(Logged))
    again = hosted.start("one")
    assert again
    hosted.follow(lambda: one.end and again.end)
    assert isinstance(one.end, Left)
    assert one.end.lost is None
    assert isinstance(again.end, Completed)


def test_a_lease_of_which_nobody_hears_is_given_up(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = hosted.start("heard")
    assert heard
    hosted.follow(lambda: heard.of(Logged))  # the base is loaded
    forever = hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, steps=5000))
    unheard = hosted.start("unheard", forever)
    assert unheard
    hosted.follow(lambda: heard.end, unheard)
    renewed = hosted.start("renewed", forever)
    assert renewed
    monkeypatch.setattr(slots_module, "LEASE_TIMEOUT_S", 5.0)
    deadline = time.monotonic() + 200
    while not hosted.has_free():
        hosted.host.renew(renewed.lease)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hosted.follow(lambda: len(renewed.of(Logged)) > 2, unheard)
    assert renewed.end is None
    events: list[Event] = []
    while not (events and isinstance(events[-1], Left)):  # it may be told after the slot is free
        assert time.monotonic() < deadline
        events += hosted.host.events(unheard.lease, 1.0)
    assert events[-1].lost is None
    time.sleep(5.1)
    hosted.host.start("new", renewed.start, hosted._paths.trial("new"))
    with pytest.raises(LeaseLost, match="is unknown here"):
        hosted.host.events(unheard.lease, 0.0)
    hosted.host.release("new")


def training(spec: SweepSpec, **values: Any) -> dict[str, Any]:
    return {"training": spec.training.model_copy(update=values)}


ALONE = {
    "biases": (["lora.bias=all"], "lora.bias all", "trl"),
    "trl": (["training.engine=trl"], "training.engine is trl", "trl"),
    "another base": (["base.quantization=none"], "its base differs from that of the other trials", "fast"),
    "a larger rank": (["lora.rank=32"], "its rank or its layers are more than the slots were made for", "fast"),
    "per layer": (
        ["training.dequantise=per_layer"],
        "training.dequantise is another than that of the trials beside it",
        "fast",
    ),
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_trial_that_cannot_share_runs_alone_and_others_go_on_afterwards(hosted: Hosted, kind: str) -> None:
    overrides, reason, engine = ALONE[kind]
    steps = ["training.steps=2", "training.eval_steps=2"]
    before = hosted.start("before")
    odd = hosted.start("odd", trial(*steps, *overrides))
    assert before
    assert odd
    hosted.follow(hosted.has_free)
    after = hosted.start("after")
    assert after
    hosted.follow(lambda: all(followed.end for followed in hosted.all))
    assert [type(followed.end) for followed in hosted.all] == [Completed] * 3
    assert odd.fields["not_packed_reason"] == reason
    assert odd.fields["engine"] == engine
    assert [event.step for event in odd.of(Evaluated)] == [2]
    assert all("not_packed_reason" not in followed.fields for followed in (before, after))
    one, other = ([event.values for event in followed.of(Logged, Evaluated)] for followed in (before, after))
    assert [values.keys() for values in one] == [values.keys() for values in other]
    for values, same in zip(one, other, strict=True):
        assert values == pytest.approx(same, rel=1e-4), "the base is as it was"


def test_a_trial_that_must_be_alone_lets_others_before_it_for_a_while_and_is_then_next(
    hosted_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted = Hosted(tmp_path / "sweep", hosted_spec, inputs.data, slots=3)
    endless = hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, steps=5000))
    odd_one = trial("training.steps=2", "training.eval_steps=2", "lora.rank=32")
    long = hosted.start("long", endless)
    assert long
    hosted.follow(lambda: long.of(Logged))
    odd = hosted.start("odd", odd_one)
    assert odd
    go_on(hosted, long)
    early = hosted.start("early")
    assert early
    hosted.follow(lambda: early.end)
    assert isinstance(early.end, Completed)
    monkeypatch.setattr(runtime_module, "MAX_ALONE_WAIT_S", 0.0)
    go_on(hosted, long)
    late = hosted.start("late")
    assert late
    go_on(hosted, long)
    assert not odd.events
    assert not late.events, "there is a slot, but it would go before the one that waits"
    order: list[str] = []
    run_alone, place = hosted.host._run_alone, hosted.host._place
    monkeypatch.setattr(hosted.host, "_run_alone", lambda *each: (run_alone(*each), order.append("odd")))
    monkeypatch.setattr(hosted.host, "_place", lambda lease: (order.append(lease.paths.trial_id), place(lease)))
    hosted.host.release(long.lease)
    hosted.follow(lambda: odd.end and late.end)
    assert order == ["odd", "late"]
    assert isinstance(odd.end, Completed)
    assert odd.fields["not_packed_reason"]
    assert isinstance(late.end, Completed)
    # Nobody is held back for one that is wanted no more.
    long, odd = hosted.start("long again", endless), hosted.start("odd again", odd_one)
    assert long
    assert odd
    hosted.follow(lambda: long.of(Logged))
    after = hosted.start("after")
    assert after
    hosted.host.release(odd.lease)
    hosted.follow(lambda: after.end)
    assert isinstance(after.end, Completed)
    assert isinstance(odd.end, Left)
    assert long.end is None
    hosted.close()


def go_on(hosted: Hosted, followed: Followed) -> None:
    """Until it has made some more steps."""
    done = len(followed.of(Logged))
    hosted.follow(lambda: len(followed.of(Logged)) > done + 30)


@pytest.mark.parametrize("place", ["adapters", "checkpoints"])
def test_a_fault_in_writing_ends_only_that_trial(hosted: Hosted, place: str) -> None:
    sound = hosted.start("sound")
    broken = hosted.start("broken", hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, steps=5000)))
    assert sound
    assert broken
    (broken.paths.root / place).write_text("no folder")
    hosted.follow(lambda: sound.end and broken.end)
    assert isinstance(sound.end, Completed)
    assert isinstance(broken.end, Left)
    assert broken.end.lost is not None
    assert broken.end.lost.startswith(("FileExistsError", "NotADirectoryError"))
    assert not broken.of(Saved)
    hosted.follow(lambda: hosted.host.free_slots() == 2)
    after = hosted.start("after")
    assert after
    hosted.follow(lambda: after.end)
    assert isinstance(after.end, Completed)


def test_a_trial_that_fails_takes_no_other_along(hosted: Hosted) -> None:
    sound = hosted.start("sound")
    wild = hosted.start("wild", trial("training.learning_rate=1e30", "training.max_grad_norm=0"))
    assert sound
    assert wild
    hosted.follow(lambda: sound.end and wild.end)
    assert isinstance(sound.end, Completed)
    assert isinstance(wild.end, Failed)
    assert "at step" in wild.end.error
    assert wild.end.traceback is None


def test_a_trial_of_unknown_layers_fails_alone(hosted: Hosted) -> None:
    sound, wrong = hosted.start("sound"), hosted.start("wrong", trial("lora.target_modules=[w_proj]"))
    assert sound
    assert wrong
    hosted.follow(lambda: sound.end and wrong.end)
    assert isinstance(sound.end, Completed)
    assert isinstance(wrong.end, Failed)
    assert "w_proj" in wrong.end.error


@pytest.mark.usefixtures("joint")
def test_a_fault_of_the_engine_ends_the_attempts_of_all_and_others_may_come(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = Engine.step, 0

    def faulty(engine: Engine, spans: Any) -> Any:
        nonlocal done
        done += 1
        if done == 4:
            raise RuntimeError("the device is gone")
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", faulty)
    pair = hosted.start("one"), hosted.start("other")
    hosted.follow(lambda: all(followed and followed.end for followed in pair))
    for followed in pair:
        assert followed
        assert isinstance(followed.end, Left)
        assert followed.end.lost == "RuntimeError: the device is gone"
    hosted.follow(lambda: hosted.host.free_slots() == 2)
    after = hosted.start("after")
    assert after
    hosted.follow(lambda: after.end)
    assert isinstance(after.end, Completed)


@pytest.mark.usefixtures("joint")
def test_trials_that_ran_out_of_memory_together_go_on_in_a_form_that_takes_less(
    hosted_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in the pass, and one that was being set up for the same engine."""
    hosted = Hosted(tmp_path / "sweep", hosted_spec, inputs.data, slots=3)
    step, is_asked, is_in, raised = Engine.step, threading.Event(), threading.Event(), 0

    def faulty(engine: Engine, spans: Any) -> Any:
        nonlocal raised
        if is_asked.is_set() and not raised:
            raised = len(spans)
            is_in.set()
            while not hosted.host._num_set_up:
                time.sleep(0.001)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", faulty)
    # At a high rate two runs in float32 part by more than they may.
    config = hosted.spec.trial_config({}).model_copy(update=training(hosted.spec, steps=60, learning_rate=2e-4))
    names = ("one", "other", "third")
    for name in names[:2]:
        assert hosted.start(name, config)
    hosted.follow(lambda: all(followed.of(Saved) for followed in hosted.all))
    is_asked.set()
    assert is_in.wait(60)
    assert hosted.start(names[2], config)
    hosted.follow(lambda: all(followed.end for followed in hosted.all))
    assert raised == 2
    for followed in hosted.all:
        assert isinstance(followed.end, Left)
        assert followed.end.lost
        assert followed.end.lost.startswith("OutOfMemoryError")
        recorder = TrialRecorder(followed.start, followed.paths, hosted.spec)
        for event in followed.events:
            recorder.record(event)
    plan = {"keeps_base": True, "recompute": "nothing", "max_tokens": CPU_TOKENS}
    assert [followed.fields["memory_plan"] for followed in hosted.all] == [plan] * 3
    before = [hosted.all.pop() for _ in names][::-1]
    for name in names:
        assert hosted.start(name, config, again=True)
    assert [followed.start.step > 0 for followed in hosted.all] == [True, True, False]
    hosted.follow(lambda: all(followed.end for followed in hosted.all))
    solo = alone(inputs, tmp_path / "alone", config)
    for followed, earlier in zip(hosted.all, before, strict=True):
        assert isinstance(followed.end, Completed)
        assert followed.fields["memory_plan"] == plan | {"recompute": "elementwise"}
        losses = {event.step: event.values["train/loss"] for event in earlier.of(Logged) + followed.of(Logged)}
        assert losses == pytest.approx(solo.losses, abs=LOSS)
    hosted.close()
