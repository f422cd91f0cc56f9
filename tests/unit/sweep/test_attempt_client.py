"""Records that the trainable of a trial writes, event by event."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError, TrialError
from orchestrator.record import (
    SweepPaths,
    TrialPaths,
    TrialResult,
    TrialState,
    end_trial,
    read_metrics,
    read_result,
    resumable,
)
from orchestrator.record.checked import read_record
from orchestrator.record.checkpoints import seal_checkpoint
from orchestrator.record.manifest import seal_folder
from orchestrator.spec import parse_spec
from orchestrator.sweep.workers.attempt_client import Claim, RemoteTrial
from orchestrator.sweep.workers.worker_client import AttemptLost
from orchestrator.training.attempt.events import Completed, Evaluated, Event, Failed, Left, Logged, Noted, Saved

TOTAL = 6
USE = (1.0, 0.0, 0.5)
UNTRACKED = {"tensorboard": False, "wandb": {"mode": "disabled"}}


def logged(step: int) -> Logged:
    values = {"train/loss": 1.0, "train/grad_norm": 0.5, "train/learning_rate": 1e-3}
    return Logged(*USE, step=step, tokens=10 * step, training_s=0.1 * step, values=values)


def evaluated(paths: TrialPaths, step: int, saves: bool = False) -> Evaluated:
    paths.adapter(step).mkdir(parents=True)
    seal_folder(paths.adapter(step))
    adapter = f"adapters/step-{step}"
    return Evaluated(*USE, step=step, tokens=10 * step, values={"eval/loss": 1 / step}, adapter=adapter, saves=saves)


def saved(paths: TrialPaths, step: int) -> Saved:
    folder = paths.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    seal_checkpoint(folder)
    return Saved(*USE, step=step, checkpoint=f"checkpoints/checkpoint-{step}")


class Workers:
    """Replaces the real workers: returns the given batches of events, one for each call."""

    def __init__(self, *batches: list[Event], unread: list[Event] | None = None) -> None:
        self.batches = list(batches)
        self.unread = unread or []
        self.evicted: list[str] = []
        self.is_released = False
        self.has_interrupted = False
        """Whether they have been asked to end all trials after a checkpoint."""

    def acquire(self, name: str, start: TrialResult, paths: TrialPaths) -> "Workers":
        return self

    def evict(self, name: str) -> None:
        self.evicted.append(name)

    def events(self) -> list[Event]:
        if not self.batches:
            raise AttemptLost("its worker was lost")
        return self.batches.pop(0)

    def release(self) -> list[Event]:
        self.is_released = True
        return self.unread

    def is_interrupted(self) -> bool:
        return self.has_interrupted

    def renew(self) -> None:
        pass


@pytest.fixture
def start(document: dict[str, Any]) -> TrialResult:
    config = parse_spec(document).trial_config({})
    return TrialResult(trial_id="a", state=TrialState.RUNNING, config=config, metric="eval/loss", mode="min")


@pytest.fixture
def paths(tmp_path: Path) -> TrialPaths:
    return SweepPaths(tmp_path).trial("a")


def trial(start: TrialResult, paths: TrialPaths, workers: Workers, tracking: Any = UNTRACKED) -> RemoteTrial:
    spec = parse_spec({**start.config.model_dump(include={"base", "data"}), "tracking": tracking})
    return RemoteTrial(start, paths, spec, workers, Claim(paths, workers))  # type: ignore[arg-type]


def steps(paths: TrialPaths) -> list[int]:
    return [point.step for point in read_metrics(paths)]


def begun() -> Noted:
    return Noted(*USE, fields={"total_steps": TOTAL})


def test_events_after_a_report_wait_for_the_next_call(start: TrialResult, paths: TrialPaths) -> None:
    early = [begun(), logged(2), evaluated(paths, 2), logged(4), evaluated(paths, 4), logged(6)]
    end = [evaluated(paths, 6), Completed(*USE)]
    workers = Workers(early, [], end)
    remote = trial(start, paths, workers)
    for step in (2, 4):
        point = remote.next()
        assert point.step == step
        assert steps(paths)[-1] == step, "recorded an evaluation that Tune has not asked for"
    result = remote.next()
    assert isinstance(result, TrialResult), "the last evaluation comes with the result"
    assert (result.state, result.step, result.extra_steps) == (TrialState.COMPLETE, 6, 0)
    assert result.best is not None
    assert result.best.step == 6
    assert read_result(paths) == result
    assert steps(paths) == [2, 2, 4, 4, 6, 6]
    assert not paths.lease.exists()
    remote.stop()
    assert read_result(paths) == result


def test_an_evaluation_is_reported_when_its_checkpoint_is_complete(start: TrialResult, paths: TrialPaths) -> None:
    workers = Workers([begun(), evaluated(paths, 2, saves=True)], [saved(paths, 2)])
    point = trial(start, paths, workers).next()
    assert point.step == 2
    assert workers.batches == []
    assert "checkpoint-2" in paths.progress.read_text()


@pytest.mark.parametrize("is_stopped_by_tune", [True, False])
@pytest.mark.parametrize("unread", [[Left(*USE, step=5, lost=None)], []], ids=["released", "worker gone"])
@pytest.mark.timeout(20)
def test_steps_past_a_stop_are_counted_and_their_files_deleted(
    start: TrialResult, paths: TrialPaths, is_stopped_by_tune: bool, unread: list[Event]
) -> None:
    early = [begun(), evaluated(paths, 2), logged(4), evaluated(paths, 4)]
    workers = Workers(early, unread=unread)
    remote = trial(start, paths, workers)
    remote.next()
    so_far = read_record(TrialResult, paths.progress)
    end_trial(paths, so_far.model_copy(update={"state": TrialState.STOPPED}))  # as the driver does
    (paths.checkpoints / "checkpoint-4").mkdir(parents=True)
    if is_stopped_by_tune:
        remote.stop()
    while paths.lease.exists():
        time.sleep(0.05)
    result = read_result(paths)
    assert (result.state, result.step, result.extra_steps) == (TrialState.STOPPED, 2, 3 if unread else 2)
    assert steps(paths) == [2]
    assert not paths.checkpoints.exists()
    assert [folder.name for folder in (paths.root / "adapters").iterdir()] == ["step-2"]


def test_release_is_not_called_for_a_trial_that_has_ended(start: TrialResult, paths: TrialPaths) -> None:
    workers = Workers([begun(), evaluated(paths, 2), evaluated(paths, 4), evaluated(paths, 6), Completed(*USE)])
    remote = trial(start, paths, workers)
    remote.next()
    so_far = read_record(TrialResult, paths.progress)
    end_trial(paths, so_far.model_copy(update={"state": TrialState.STOPPED}))
    remote.stop()
    assert not workers.is_released, "its last event has been read: no other one would come"
    result = read_result(paths)
    assert (result.state, result.step, result.extra_steps) == (TrialState.STOPPED, 2, 4)
    assert [folder.name for folder in (paths.root / "adapters").iterdir()] == ["step-2"]


def test_an_interrupted_trial_stays_as_it_was_reported(start: TrialResult, paths: TrialPaths) -> None:
    workers = Workers([begun(), evaluated(paths, 2), evaluated(paths, 4)], unread=[Left(*USE, step=5, lost=None)])
    remote = trial(start, paths, workers)
    remote.next()
    remote.stop()
    so_far = read_record(TrialResult, paths.progress)
    assert (so_far.state, so_far.step, so_far.extra_steps) == (TrialState.RUNNING, 2, 0)
    assert not paths.result.exists()
    assert not paths.lease.exists()


@pytest.mark.parametrize(
    ("end", "counts"),
    [
        (Left(*USE, step=3, lost="RuntimeError: CUDA error"), True),
        (Left(*USE, step=3, lost="its node is about to go away", is_outside=True), False),
        (Left(*USE, step=3, lost=None), False),
    ],
    ids=["error", "preempted", "stopped"],
)
def test_only_an_error_of_the_training_counts_as_a_failure(
    start: TrialResult, paths: TrialPaths, end: Left, counts: bool
) -> None:
    remote = trial(start, paths, Workers([begun(), end]))
    with pytest.raises(AttemptLost) as raised:
        remote.next()
    assert raised.value.counts is counts


@pytest.mark.parametrize("events", [[Left(*USE, step=3, lost="CUDA error")], []], ids=["events", "worker gone"])
def test_a_fault_outside_the_trial_ends_the_attempt(start: TrialResult, paths: TrialPaths, events: list[Event]) -> None:
    batches = [[begun(), evaluated(paths, 2)], *([events] if events else [])]
    remote = trial(start, paths, Workers(*batches))
    remote.next()
    with pytest.raises(AttemptLost, match="CUDA error" if events else "worker was lost"):
        remote.next()
    assert not paths.result.exists()
    assert read_record(TrialResult, paths.progress).step == 2


def test_a_failure_is_recorded_and_raised(start: TrialResult, paths: TrialPaths) -> None:
    failed = Failed(*USE, error="train/loss is nan at step 3", remedy="Lower it.", traceback=None, cause="diverged")
    remote = trial(start, paths, Workers([begun(), evaluated(paths, 2), failed]))
    remote.next()
    with pytest.raises(TrialError, match="at step 3"):
        remote.next()
    assert (read_result(paths).state, read_result(paths).failure) == (TrialState.FAILED, "diverged")


def test_a_trial_of_an_interrupted_sweep_keeps_its_last_steps(start: TrialResult, paths: TrialPaths) -> None:
    early = [begun(), logged(2), evaluated(paths, 2)]
    late = [logged(4), evaluated(paths, 4), logged(5), saved(paths, 5), Left(*USE, step=5, lost=None)]
    workers = Workers(early, unread=late)
    remote = trial(start, paths, workers)
    remote.next()
    workers.has_interrupted = True
    remote.stop()
    so_far = resumable(paths, start.config)
    assert so_far is not None
    assert (so_far.step, so_far.tokens, so_far.checkpoint) == (5, 50, "checkpoints/checkpoint-5")
    assert so_far.best is not None
    assert so_far.best.step == 4
    assert steps(paths) == [2, 2, 4, 4, 5]
    assert not paths.lease.exists()
    assert not paths.result.exists()


def test_a_full_disk_is_not_reported_as_a_lost_worker(start: TrialResult, paths: TrialPaths) -> None:
    fault = Left(*USE, step=2, lost="OSError: [Errno 28] No space left on device", is_storage=True)
    remote = trial(start, paths, Workers([begun(), fault]))
    with pytest.raises(StorageError, match="No space left on device"):
        remote.next()
    assert not paths.result.exists(), "the trial has not failed"


def test_another_attempt_takes_over_a_trial(start: TrialResult, paths: TrialPaths) -> None:
    old = Workers([begun(), evaluated(paths, 2)], unread=[Left(*USE, step=5, lost=None)])
    first = trial(start, paths, old)
    first.next()
    name = paths.lease.read_text()
    new = Workers([begun(), evaluated(paths, 4)])
    second = trial(start, paths, new)
    assert new.evicted == [name], "the slot of the earlier attempt is freed first"
    second.next()
    written = paths.progress.read_text()
    first.stop()
    assert paths.progress.read_text() == written, "the old attempt wrote into a trial of the new one"
    assert paths.lease.read_text() != name


def test_the_slot_is_freed_if_the_record_cannot_be_written(
    start: TrialResult, paths: TrialPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("orchestrator.training.attempt.recorder.open_trackers", refuse)
    workers = Workers()
    with pytest.raises(OSError, match="no space left"):
        trial(start, paths, workers)
    assert workers.is_released


def test_a_tracker_that_cannot_start_is_a_warning_and_the_trial_continues(
    start: TrialResult, paths: TrialPaths
) -> None:
    paths.tensorboard.parent.mkdir(parents=True)
    paths.tensorboard.touch()  # a file at the path of its folder
    workers = Workers([begun(), evaluated(paths, 2), evaluated(paths, 6), Completed(*USE)])
    remote = trial(start, paths, workers, {"tensorboard": True, "wandb": {"mode": "disabled"}})
    (warning,) = read_record(TrialResult, paths.progress).warnings
    assert warning.startswith("TensorBoard failed: FileExistsError: ")
    remote.next()
    result = remote.next()
    assert isinstance(result, TrialResult)
    assert (result.state, result.warnings, result.untracked) == (TrialState.COMPLETE, [warning], ["TensorBoard"])
    assert read_result(paths) == result


def test_a_stopped_trial_is_tracked_to_its_end(start: TrialResult, paths: TrialPaths) -> None:
    """The driver writes the result of the trial while the trackers are open."""
    remote = trial(start, paths, Workers([begun(), evaluated(paths, 2)]), {"wandb": {"mode": "disabled"}})
    remote.next()
    so_far = read_record(TrialResult, paths.progress)
    assert so_far.untracked == ["TensorBoard"], "if the trainable is killed now, the driver catches up"
    end_trial(paths, so_far.model_copy(update={"state": TrialState.STOPPED}))
    remote.stop()
    assert (read_result(paths).state, read_result(paths).untracked) == (TrialState.STOPPED, [])


def test_a_trainable_imports_no_heavy_library() -> None:
    code = (
        "import sys, orchestrator.sweep.workers.trainable, orchestrator.tracking.tensorboard\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'tensorflow', 'optuna', 'orchestrator.sweep.run'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_paused_trial_frees_its_slot_and_continues_from_its_checkpoint(start: TrialResult, paths: TrialPaths) -> None:
    events = [begun(), logged(2), evaluated(paths, 2, saves=True), saved(paths, 2), logged(4), evaluated(paths, 4)]
    workers = Workers(events, unread=[Left(*USE, step=4, lost=None)])
    remote = trial(start, paths, workers)
    assert remote.next().step == 2
    paths.paused.touch()
    deadline = time.monotonic() + 10
    while (not workers.is_released or paths.lease.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers.is_released
    assert not paths.lease.exists()
    assert set(steps(paths)) == {2}, "later steps of the worker are not recorded"
    so_far = resumable(paths, start.config)
    assert so_far is not None
    assert (so_far.state, so_far.step, so_far.checkpoint) == (TrialState.RUNNING, 2, "checkpoints/checkpoint-2")


def test_the_first_step_of_a_trial_starts_the_clock_of_the_budget(start: TrialResult, paths: TrialPaths) -> None:
    first_step = SweepPaths(paths.sweep).first_step
    remote = trial(start, paths, Workers([Noted(*USE, fields={"total_steps": 6}), evaluated(paths, 2)]))
    remote.next()
    assert not first_step.exists(), "the trial is set up, but has made no step"
    remote.stop()
    remote = trial(start, paths, Workers([Noted(*USE, fields={"applied": {}}), evaluated(paths, 4)]))
    remote.next()
    assert first_step.is_file()
