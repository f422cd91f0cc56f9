"""Trials of a worker that cannot share an engine, and run alone."""

from pathlib import Path

import pytest
from followed_worker import FollowedWorker
from shared_engine import trial

from orchestrator.spec import SweepSpec
from orchestrator.training.attempt.events import (
    Completed,
    Evaluated,
    Left,
    Logged,
)
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.worker import runtime as runtime_module

pytestmark = pytest.mark.slow


UNSHARED = {
    "biases": (["lora.bias=all"], "lora.bias all", "trl"),
    "trl": (["training.engine=trl"], "training.engine is trl", "trl"),
    "another base": (["base.quantization=none"], "its base differs from that of the other trials", "fast"),
    "a larger rank": (["lora.rank=32"], "its rank or its adapted layers exceed what the slots were built for", "fast"),
    "per layer": (
        ["training.dequantize=per_layer"],
        "training.dequantize differs from that of the trials that share the engine",
        "fast",
    ),
}


@pytest.mark.parametrize("kind", UNSHARED)
def test_trial_that_cannot_share_runs_alone_and_others_continue_afterwards(worker: FollowedWorker, kind: str) -> None:
    overrides, reason, engine = UNSHARED[kind]
    steps = ["training.steps=2", "training.eval_steps=2"]
    before = worker.start("before")
    odd = worker.start("odd", trial(*steps, *overrides))
    assert before
    assert odd
    worker.follow(worker.has_free)
    after = worker.start("after")
    assert after
    worker.follow(lambda: all(followed.end for followed in worker.all))
    assert [type(followed.end) for followed in worker.all] == [Completed] * 3
    assert odd.fields["not_packed_reason"] == reason
    assert odd.fields["engine"] == engine
    assert [event.step for event in odd.of(Evaluated)] == [2]
    assert all("not_packed_reason" not in followed.fields for followed in (before, after))
    one, other = ([event.values for event in followed.of(Logged, Evaluated)] for followed in (before, after))
    assert [values.keys() for values in one] == [values.keys() for values in other]
    for values, same in zip(one, other, strict=True):
        assert values == pytest.approx(same, rel=1e-4), "the base is as it was"


def test_trial_that_must_run_alone_is_overtaken_for_a_while_and_is_then_next(
    worker_spec: SweepSpec, inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FollowedWorker(tmp_path / "sweep", worker_spec, inputs.data, slots=3)
    endless = worker.config(steps=5000)
    odd_one = trial("training.steps=2", "training.eval_steps=2", "lora.rank=32")
    long = worker.start("long", endless)
    assert long
    worker.follow(lambda: long.of(Logged))
    odd = worker.start("odd", odd_one)
    assert odd
    worker.follow_more_steps(long)
    early = worker.start("early")
    assert early
    worker.follow(lambda: early.end)
    assert isinstance(early.end, Completed)
    monkeypatch.setattr(runtime_module, "MAX_ALONE_WAIT_S", 0.0)
    worker.follow_more_steps(long)
    late = worker.start("late")
    assert late
    worker.follow_more_steps(long)
    assert not odd.events
    assert not late.events, "a slot is free, but it would overtake the waiting trial"
    order: list[str] = []
    run_alone, place = worker.runtime._run_alone, worker.runtime._place
    monkeypatch.setattr(worker.runtime, "_run_alone", lambda *each: (run_alone(*each), order.append("odd")))
    monkeypatch.setattr(worker.runtime, "_place", lambda lease: (order.append(lease.paths.trial_id), place(lease)))
    worker.runtime.release(long.lease)
    worker.follow(lambda: odd.end and late.end)
    assert order == ["odd", "late"]
    assert isinstance(odd.end, Completed)
    assert odd.fields["not_packed_reason"]
    assert isinstance(late.end, Completed)
    # A released trial no longer holds others back.
    long, odd = worker.start("long again", endless), worker.start("odd again", odd_one)
    assert long
    assert odd
    worker.follow(lambda: long.of(Logged))
    after = worker.start("after")
    assert after
    worker.runtime.release(odd.lease)
    worker.follow(lambda: after.end)
    assert isinstance(after.end, Completed)
    assert isinstance(odd.end, Left)
    assert long.end is None
    worker.close()
