"""Which failed attempts count, and when a trial is given up."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError
from simulated import begin_record

from orchestrator.errors import ClusterError
from orchestrator.record import (
    SweepPaths,
    SweepRecord,
    TrialState,
    read_result,
    read_sweep,
    read_trial,
    write_record,
)
from orchestrator.record.faults import read_faults
from orchestrator.spec import parse_spec
from orchestrator.sweep.failures import UNLIMITED, FailureCounter, counts_as_failure, words_of
from orchestrator.sweep.workers.losses import AttemptLost, why_lost

ERROR = AttemptLost("RuntimeError: CUDA error: illegal access", counts=True)
LOSS = AttemptLost("its worker was lost: its node died")


@pytest.fixture
def record(tmp_path: Path, document: dict[str, Any]) -> SweepRecord:
    document["resources"] = {"max_failures": 1, "max_restarts": 2}
    begin_record(SweepPaths(tmp_path / "s"), parse_spec(document))
    return read_sweep(tmp_path / "s")


def attempt(record: SweepRecord, error: BaseException, name: str = "a") -> Any:
    """Return a Tune trial whose attempt has failed by an error that Ray has passed on."""
    file = record.paths.root / "error.pkl"
    file.parent.mkdir(parents=True, exist_ok=True)
    passed = error if isinstance(error, ActorDiedError) else RayTaskError("step", "trace", error).as_instanceof_cause()
    file.write_bytes(cloudpickle.dumps(passed))
    paths = record.paths.trial(name)
    if not paths.config.is_file():
        write_record(paths.config, record.info.spec.trial_config({}))
    return SimpleNamespace(pickled_error_file=str(file), trial_id=name, max_failures=UNLIMITED, config={})


def save(record: SweepRecord, step: int, name: str = "a") -> None:
    """Let a trial have a new checkpoint."""
    paths = record.paths.trial(name)
    so_far = read_trial(paths, record.info)
    changes = {"state": TrialState.RUNNING, "step": step, "checkpoint": f"checkpoints/checkpoint-{step}"}
    write_record(paths.progress, so_far.model_copy(update=changes))


def test_errors_of_training_are_limited_and_losses_of_workers_do_not_count_as_such(record: SweepRecord) -> None:
    said: list[str] = []
    counter = FailureCounter(record, said.append)
    for error in (LOSS, ERROR, LOSS):
        trial = attempt(record, error)
        counter.take(trial)
        assert trial.max_failures == UNLIMITED
    trial = attempt(record, ERROR)
    counter.take(trial)
    assert trial.max_failures == 0, "the next attempt, which reads the result, is the last"
    result = read_result(record.paths.trial("a"))
    assert (result.state, result.failure) == (TrialState.FAILED, "infrastructure")
    assert result.error == (
        "gave up after 2 failures without a new checkpoint; the last: RuntimeError: CUDA error: illegal access"
    )
    faults = read_faults(record.paths)
    assert [str(fault) for fault in faults] == said
    assert [fault.then for fault in faults] == [
        "restarts from step 0",
        "restarts from step 0",
        "restarts from step 0 (2 of 2 without a new checkpoint)",
        "gave up after 2 failures without a new checkpoint",
    ]
    assert faults[0].cause == "its worker was lost: its node died"


def test_losses_without_a_new_checkpoint_are_limited_too(record: SweepRecord) -> None:
    counter = FailureCounter(record, lambda _: None)
    trials = [attempt(record, LOSS) for _ in range(3)]
    for trial in trials:
        counter.take(trial)
    assert [trial.max_failures for trial in trials] == [UNLIMITED, UNLIMITED, 0]
    error = read_result(record.paths.trial("a")).error
    assert error == "gave up after 3 losses without a new checkpoint; the last: its worker was lost: its node died"


def test_a_new_checkpoint_resets_both_counts(record: SweepRecord) -> None:
    counter = FailureCounter(record, lambda _: None)
    for step, error in zip(range(4, 40, 4), itertools.cycle([LOSS, ERROR]), strict=False):
        counter.take(attempt(record, error))
        save(record, step)
    assert not record.paths.trial("a").result.is_file()
    assert read_faults(record.paths)[-1].step == 32


def test_counts_are_of_one_trial(record: SweepRecord) -> None:
    counter = FailureCounter(record, lambda _: None)
    for name in ("a", "b"):
        counter.take(attempt(record, ERROR, name))
    assert not record.paths.trial("b").result.is_file()


def test_with_no_failure_allowed_the_cause_is_the_true_one(record: SweepRecord) -> None:
    resources = record.info.spec.resources.model_copy(update={"max_failures": 0})
    spec = record.info.spec.model_copy(update={"resources": resources})
    record = SweepRecord(record.paths, record.info.model_copy(update={"spec": spec}))
    FailureCounter(record, lambda _: None).take(attempt(record, ERROR))
    error = read_result(record.paths.trial("a")).error
    assert error is not None
    assert error.endswith("the last: RuntimeError: CUDA error: illegal access")


def test_a_trial_that_has_ended_itself_gets_one_attempt_which_reads_the_result(record: SweepRecord) -> None:
    counter = FailureCounter(record, lambda _: None)
    trial = attempt(record, ERROR)
    paths = record.paths.trial("a")
    write_record(paths.result, read_trial(paths, record.info).model_copy(update={"state": TrialState.FAILED}))
    counter.take(trial)
    assert trial.max_failures == 0
    assert read_faults(record.paths) == []
    counter.allow(again := attempt(record, ERROR))
    assert again.max_failures == 0


def test_what_counts_as_a_failure() -> None:
    def passed(error: Exception) -> BaseException:
        return RayTaskError("step", "trace", error).as_instanceof_cause()  # type: ignore[no-any-return]

    assert counts_as_failure(passed(ERROR))
    assert counts_as_failure(passed(ClusterError("node n does not see /runs")))
    assert not counts_as_failure(passed(LOSS))
    assert not counts_as_failure(ActorDiedError())
    assert not counts_as_failure(None)
    assert words_of(None) == "its process died"


def test_an_attempt_that_was_lost_is_the_same_after_a_journey() -> None:
    assert cloudpickle.loads(cloudpickle.dumps(ERROR)).counts
    assert str(cloudpickle.loads(cloudpickle.dumps(LOSS))) == "its worker was lost: its node died"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Task was killed due to the node running low on memory.", "the memory of its node ran short"),
        ("The actor died because its node has died. Node Id: 1", "its node died"),
        ("Worker unexpectedly exits with a connection error code 2. End of file.", "its process died: killed"),
        ("Some other text\nof two lines", "Some other text"),
        ("", "its process died: killed"),
    ],
)
def test_the_cause_of_a_loss_in_words(text: str, words: str) -> None:
    assert why_lost(text).startswith(words)
