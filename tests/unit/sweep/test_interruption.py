"""Signals and storage faults end Tune's loop, and do not count as failures of a trial."""

import errno
import os
from pathlib import Path
from signal import Signals
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial

from orchestrator.errors import StorageError, SweepError, TrialError
from orchestrator.record import SweepPaths
from orchestrator.signals import StopRequest
from orchestrator.sweep.interruption import Interrupter, Interruption

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "progress.json")


class Workers:
    """Counts the requests to write checkpoints."""

    num_asked = 0

    def interrupt(self, wait_s: float) -> None:
        assert wait_s > 0
        self.num_asked += 1


def failed(tmp_path: Path, error: BaseException | None) -> Any:
    """Return a Tune trial whose attempt has failed by an error that Ray has passed on."""
    if error is None:
        return SimpleNamespace(pickled_error_file=None, status=Trial.ERROR)
    file = tmp_path / "error.pkl"
    file.write_bytes(cloudpickle.dumps(RayTaskError("step", "the traceback", error).as_instanceof_cause()))
    return SimpleNamespace(pickled_error_file=str(file), status=Trial.ERROR)


class Failures:
    """Counts the failed attempts."""

    num_taken = 0

    def take(self, trial: Any) -> None:
        self.num_taken += 1


def make(
    tmp_path: Path, signal: Signals | None = None, failures: Failures | None = None, fault: SweepError | None = None
) -> tuple[Interrupter, Workers]:
    stop, workers = StopRequest(), Workers()
    stop.signal = signal
    paths = SweepPaths(tmp_path / "s")
    return Interrupter(stop, workers, paths, failures or Failures(), lambda: fault), workers  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [FULL, StorageError("OSError: [Errno 28] No space left on device")])
def test_a_storage_fault_ends_the_sweep(tmp_path: Path, error: BaseException) -> None:
    interrupter, workers = make(tmp_path)
    with pytest.raises(StorageError, match=r"its storage fails: .*No space left on device") as raised:
        interrupter.check_trial(failed(tmp_path, error))
    assert raised.value.remedy.endswith(f"orchestrator resume {tmp_path / 's'}")
    assert raised.value.exit_code == 74
    assert workers.num_asked == 1, "the other trials write checkpoints first"


@pytest.mark.parametrize("error", [None, TrialError("loss is nan at step 3"), PermissionError("of somebody else")])
def test_any_other_error_is_left_to_the_trial(tmp_path: Path, error: BaseException | None) -> None:
    failures = Failures()
    interrupter, workers = make(tmp_path, failures=failures)
    interrupter.check_trial(failed(tmp_path, error))
    interrupter.check()
    assert workers.num_asked == 0
    assert failures.num_taken == 1
    final = failed(tmp_path, error)
    final.status = Trial.RUNNING  # Tune gives it up
    interrupter.check_trial(final)
    assert failures.num_taken == 1


def test_a_fault_of_all_workers_ends_the_sweep(tmp_path: Path) -> None:
    interrupter, workers = make(tmp_path, fault=SweepError("no worker is left"))
    with pytest.raises(SweepError, match="no worker is left"):
        interrupter.check()
    assert workers.num_asked == 1, "workers that still live write checkpoints first"


def test_a_signal_ends_the_sweep_after_checkpoints_and_before_a_failure_counts(tmp_path: Path) -> None:
    interrupter, workers = make(tmp_path, Signals.SIGTERM)
    with pytest.raises(Interruption):
        interrupter.check()
    with pytest.raises(Interruption):
        interrupter.check_trial(failed(tmp_path, TrialError("its worker was ended by the same signal")))
    assert workers.num_asked == 2


def test_the_interrupter_is_pickled_without_its_attributes(tmp_path: Path) -> None:
    interrupter, _ = make(tmp_path)
    assert cloudpickle.loads(cloudpickle.dumps(interrupter.check)).__self__.__dict__ == {}


def test_the_conductor_checks_a_failure_before_its_scheduler_sees_it(make_stage: Any) -> None:
    stage = make_stage({"kind": "asha", "grace_steps": 10}, num_slots=2)
    seen: list[str] = []

    def look(trial: Any) -> None:
        seen.append(trial.trial_id)
        raise StorageError("full")

    stage.conductor._check_failure = look
    stage.add(a=[0.4, 0.3, 0.2, 0.1])
    trial = stage.trial("a")
    trial.set_status(Trial.RUNNING)
    with pytest.raises(StorageError, match="full"):
        stage.conductor.on_trial_error(stage, trial)
    assert seen == ["a"]


def test_a_trial_of_a_restored_searcher_gets_the_folder_of_this_driver(make_stage: Any) -> None:
    stage = make_stage({"kind": "asha", "grace_steps": 10})
    trial = Trial("idle", stub=True, trial_id="late")
    before = SimpleNamespace(storage_fs_path="/where/it/lay/before", trial_fs_path="/where/it/lay/before/tune/late")
    trial.storage = before
    stage.conductor.on_trial_add(stage, trial)
    assert trial.storage.storage_fs_path == str(stage.paths.root)
    assert before.storage_fs_path == "/where/it/lay/before", "the original is shared by other trials of that searcher"
