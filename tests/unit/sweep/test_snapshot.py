import errno
import io
import os
import pickle
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damaging import damaged_texts
from ray.tune.execution.experiment_state import _ExperimentCheckpointManager
from simulated import MakeStage, falling, steered

from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.record.requests import read_answer, write_request
from orchestrator.sweep.results import ResultKeeper
from orchestrator.sweep.schedulers.scheduler_state import thaw
from orchestrator.sweep.snapshot import has_trials, require_signed, restore_snapshot, save_snapshot, trust_snapshot
from orchestrator.upstream import limit_state_writing, write_state_next


def test_an_incomplete_state_is_replaced_by_the_complete_one(tmp_path: Path) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    whole = {
        "experiment_state-1.json": "{}",
        "search_gen_state-1.json": "{}",
        "searcher-state-1.pkl": "state",
        "basic-variant-state-1.json": "state",
    }
    for name, text in whole.items():
        (staging / name).write_text(text)
    save_snapshot(paths, staging, b"rungs")
    for name in (*whole, "searcher-state-2.pkl"):  # the last is of a driver that died at once
        (paths.tune / name).write_text("")
    assert restore_snapshot(paths) == b"rungs"
    restored = {name.replace("-1.", "-0000-restored."): text for name, text in whole.items()}
    assert {file.name: file.read_text() for file in paths.tune.iterdir()} == restored
    assert {file.name for file in paths.root.iterdir()} == {"tune", paths.tune_snapshot.name}


def saved_twice(folder: Path) -> SweepPaths:
    """Return a sweep whose state was saved as `old`, then as `new`."""
    paths, staging = SweepPaths(folder / "sweep"), folder / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    for text in ("old", "new"):
        (staging / "searcher-state-1.pkl").write_text(text)
        save_snapshot(paths, staging, text.encode())
    return paths


def test_the_newest_state_is_kept(tmp_path: Path) -> None:
    paths = saved_twice(tmp_path)
    assert restore_snapshot(paths) == b"new"
    assert (paths.tune / "searcher-state-0000-restored.pkl").read_text() == "new"


def test_a_clock_that_was_set_back_hides_no_later_state(tmp_path: Path) -> None:
    """Tune names its files by the time and reads the name that sorts last."""
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    (staging / "experiment_state-2026-05-01_12-00-00.json").write_text("first driver")
    save_snapshot(paths, staging, b"first")
    assert restore_snapshot(paths) == b"first"
    for file in staging.iterdir():
        file.unlink()
    for file in paths.tune.iterdir():  # Tune copies what it restores to its new folder on this machine
        (staging / file.name).write_bytes(file.read_bytes())
    second = staging / "experiment_state-2026-05-01_11-00-00.json"
    for text in ("second driver", "its later state"):
        second.write_text(text)
        os.utime(second, (1.0, 1.0 + len(text)))
        save_snapshot(paths, staging, text.encode())
    assert restore_snapshot(paths) == b"its later state"
    assert [file.read_text() for file in paths.tune.iterdir()] == ["its later state"]


def test_without_a_snapshot_nothing_is_loaded(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path)
    paths.tune.mkdir()
    (paths.tune / "experiment_state-1.json").write_text("{}")
    assert not has_trials(SweepPaths(tmp_path / "none"))
    assert has_trials(paths)
    assert restore_snapshot(paths) is None
    assert not has_trials(paths)


def test_a_search_whose_snapshot_is_missing_does_not_begin_anew(tmp_path: Path, make_sweep: Any) -> None:
    paths = make_sweep(tmp_path / "sweep", {"a": ("RUNNING", 0.5)})
    with pytest.raises(RecordError, match=r"tune-snapshot.zip: is missing.* after a") as refused:
        restore_snapshot(paths)
    assert f"--warm-from {paths.root}" in refused.value.remedy


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "name",
    [
        "experiment_state-9999.json",
        "search_gen_state-9999.json",
        "searcher-state-9999.pkl",
        "basic-variant-state-9999.json",
        "callback-states-9999.pkl",
        "tuner.pkl",
        "a_00000/error.pkl",
        "a_00000/checkpoint_000000/_dict_checkpoint.pkl",
    ],
)
def test_a_pickle_planted_in_tunes_folder_is_removed(tmp_path: Path, name: str) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    staging.mkdir()
    (staging / "searcher-state-1.pkl").write_text("own")
    planted = paths.tune / name
    planted.parent.mkdir(parents=True)
    save_snapshot(paths, staging, b"own")
    planted.write_bytes(pickle.dumps(Planted(tmp_path / "mark")))
    assert restore_snapshot(paths) == b"own"
    assert [file.name for file in paths.tune.rglob("*") if file.is_file()] == ["searcher-state-0000-restored.pkl"]
    assert (paths.tune / "searcher-state-0000-restored.pkl").read_text() == "own"


@pytest.mark.parametrize("linked", ["tune", "tune/a_00000", "tune/searcher-state-9999.pkl"])
def test_a_link_in_tunes_folder_is_refused(tmp_path: Path, linked: str) -> None:
    """A link to a folder hides the files in it from the search for pickles, but not from Tune."""
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    staging.mkdir()
    paths.root.mkdir()
    (staging / "searcher-state-1.pkl").write_text("own")
    save_snapshot(paths, staging, b"own")
    (paths.root / linked).parent.mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "error.pkl").touch()
    (paths.root / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="is a symbolic link"):
        restore_snapshot(paths)
    assert (tmp_path / "elsewhere" / "error.pkl").is_file()


def test_a_snapshot_of_somebody_else_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = SweepPaths(tmp_path)
    paths.tune.mkdir()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("experiment_state-1.json", "{}")
        packed.writestr("scheduler.pkl", pickle.dumps(Planted(tmp_path / "mark")))
    paths.tune_snapshot.write_bytes(archive.getvalue())
    with pytest.raises(RecordError, match=r"tune-snapshot.zip: is not signed"):
        require_signed(paths)
    with pytest.raises(RecordError, match=r"tune-snapshot.zip: is not signed"):
        restore_snapshot(paths)
    trust_snapshot(paths)
    require_signed(paths)
    assert restore_snapshot(paths) == pickle.dumps(Planted(tmp_path / "mark"))
    monkeypatch.setenv("ORCHESTRATOR_STATE_KEY", "b" * 64)
    with pytest.raises(RecordError, match="is signed with another key"):
        require_signed(paths)
    trust_snapshot(paths)
    require_signed(paths)


def test_a_full_disk_leaves_the_previous_state_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    (staging / "searcher-state-1.pkl").write_text("old")
    save_snapshot(paths, staging, b"old")
    (staging / "searcher-state-1.pkl").write_text("new")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "writestr", fail)
        with pytest.raises(OSError, match="No space left"):
            save_snapshot(paths, staging, b"new")
    assert {file.name for file in paths.root.iterdir()} == {"tune", paths.tune_snapshot.name}
    assert restore_snapshot(paths) == b"old"


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    paths = saved_twice(tmp_path)
    whole, before = paths.tune_snapshot.read_bytes(), paths.tune_snapshot_before.read_bytes()
    for damaged in damaged_texts(whole, step=1):
        paths.tune_snapshot.write_bytes(damaged)
        paths.tune_snapshot_before.write_bytes(before)
        said: list[str] = []
        assert restore_snapshot(paths, said.append) == b"old"
        assert "the search continues from the state before it" in said[0]
        assert (paths.tune / "searcher-state-0000-restored.pkl").read_text() == "old"
        assert paths.tune_snapshot.read_bytes() == before
    paths.tune_snapshot.write_bytes(b"")
    paths.tune_snapshot_before.write_bytes(whole[:-1])
    with pytest.raises(RecordError, match=r"tune-snapshot.zip: is not signed"):
        restore_snapshot(paths)
    trust_snapshot(paths)
    with pytest.raises(RecordError, match=r"tune-snapshot.zip: is not signed"):
        require_signed(paths)


def managed() -> tuple[Any, Any]:
    """Return a controller with Tune's own manager of its state, and the manager."""
    syncer = SimpleNamespace(wait=lambda: None, sync_up=lambda *_: True)
    storage: Any = SimpleNamespace(experiment_driver_staging_path="", experiment_fs_path="", syncer=syncer)
    manager = _ExperimentCheckpointManager(storage=storage, checkpoint_period=0, sync_every_n_trial_checkpoints=None)
    manager.sync_up_experiment_state(lambda: None)  # the first one imports libraries
    return SimpleNamespace(_tune_controller=SimpleNamespace(_checkpoint_manager=manager)), manager


def test_states_that_take_long_are_written_less_often() -> None:
    """With a free 20 ms and a tenth of the time, a state of 120 ms is followed by a pause of 0.9 s."""
    controller, manager = managed()
    heard: list[bool] = []
    limit_state_writing(controller, free_s=0.02, max_share=0.1, longest_s=5.0, written=lambda: heard.append(True))
    written: list[float] = []

    def write(takes_s: float) -> None:
        time.sleep(takes_s)
        written.append(takes_s)

    for takes_s in (0.0, 0.0, 0.12, 0.0, 0.0):
        manager.sync_up_experiment_state(partial(write, takes_s))
    assert written == [0.0, 0.0, 0.12]
    assert len(heard) == 3
    assert manager._checkpoint_period == pytest.approx(0.9, abs=0.5)
    write_state_next(controller)
    manager.sync_up_experiment_state(partial(write, 0.0))
    assert written == [0.0, 0.0, 0.12, 0.0], "whatever the pause"
    manager._update_auto_checkpoint_time(time_taken=60.0)
    assert manager._checkpoint_period == 5.0


def test_a_snapshot_holds_the_states_of_one_moment_and_answers_come_after_it(
    make_stage: MakeStage, tmp_path: Path
) -> None:
    """While Tune's last state is one of before, neither the scheduler's state nor an answer is written."""
    stage = steered(make_stage({"kind": "none"}))
    _, manager = managed()
    stage._checkpoint_manager, stage._tune_controller = manager, stage
    stage.add(a=falling(0), b=falling(0))
    for trial in stage.trials:
        trial.storage.experiment_driver_staging_path = tmp_path / "staging"
        trial.set_status("RUNNING")
    (tmp_path / "staging").mkdir()
    paths, turn = stage.paths, 0
    paths.tune.mkdir(exist_ok=True)
    keeper = ResultKeeper(read_sweep(paths.root), stage.conductor, lambda: None)

    def take_turn(takes_s: float = 0.0) -> tuple[str, set[str]]:
        """Return Tune's state in the snapshot, and the trials that are to leave in the scheduler's state there."""
        nonlocal turn
        turn += 1
        stage.conductor.steering._looked_s = 0.0
        keeper.on_step_begin(turn, stage.trials)

        def write() -> None:
            time.sleep(takes_s)
            (tmp_path / "staging" / "experiment_state-1.json").write_text(f"turn {turn}")

        manager.sync_up_experiment_state(write)
        keeper.on_step_end(turn, stage.trials)
        with zipfile.ZipFile(paths.tune_snapshot) as packed:
            state = thaw(packed.read("scheduler.pkl"), {})
            return packed.read("experiment_state-1.json").decode(), set(state["steering"]["leaving"])

    assert take_turn() == ("turn 1", set())
    assert take_turn(0.12) == ("turn 2", set())
    stage.conductor.steering._leaving["b"] = "stop", "somebody"
    assert take_turn() == ("turn 2", set()), "Tune pauses after the long state"
    request = write_request(paths, "stop", trial_id="a")
    assert take_turn() == ("turn 2", set())  # sees the request
    assert read_answer(paths, request) is None
    assert take_turn() == ("turn 5", {"a", "b"}), "a request does not wait for the end of the pause"
    assert read_answer(paths, request) is not None
