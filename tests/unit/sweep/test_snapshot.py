import errno
import os
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damaging import damaged_texts
from ray.tune.execution.experiment_state import _ExperimentCheckpointManager

from orchestrator.record import SweepPaths
from orchestrator.sweep.snapshot import SnapshotWriter, has_trials, restore_snapshot
from orchestrator.upstream import limit_state_writing


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
    SnapshotWriter(paths).save(staging, lambda: b"rungs")
    for name in (*whole, "searcher-state-2.pkl"):  # the last is of a driver that died at once
        (paths.tune / name).write_text("")
    (paths.tune / "tuner.pkl").write_text("tuner")
    assert restore_snapshot(paths) == b"rungs"
    restored = {name.replace("-1.", "-0000-restored."): text for name, text in whole.items()}
    assert {file.name: file.read_text() for file in paths.tune.iterdir()} == restored | {"tuner.pkl": "tuner"}
    assert {file.name for file in paths.root.iterdir()} == {"tune", paths.tune_snapshot.name}


def test_the_newest_state_is_kept(tmp_path: Path) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    for text in ("old", "new"):
        (staging / "searcher-state-1.pkl").write_text(text)
        SnapshotWriter(paths).save(staging, text.encode)
    assert restore_snapshot(paths) == b"new", "both states are of the same time"
    assert (paths.tune / "searcher-state-0000-restored.pkl").read_text() == "new"


def test_a_clock_that_was_set_back_hides_no_later_state(tmp_path: Path) -> None:
    """Tune names its files by the time and reads the name that sorts last."""
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    (staging / "experiment_state-2026-05-01_12-00-00.json").write_text("first driver")
    SnapshotWriter(paths).save(staging, lambda: b"first")
    assert restore_snapshot(paths) == b"first"
    for file in staging.iterdir():
        file.unlink()
    for file in paths.tune.iterdir():  # Tune copies what it restores to its new folder on this machine
        (staging / file.name).write_bytes(file.read_bytes())
    second, writer = staging / "experiment_state-2026-05-01_11-00-00.json", SnapshotWriter(paths)
    for text in ("second driver", "its later state"):
        second.write_text(text)
        os.utime(second, (1.0, 1.0 + len(text)))
        writer.save(staging, text.encode)
    assert restore_snapshot(paths) == b"its later state"
    assert [file.read_text() for file in paths.tune.iterdir()] == ["its later state"]


def test_an_unchanged_state_is_not_written_again(tmp_path: Path) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    (staging / "searcher-state-1.pkl").write_text("old")
    os.utime(staging / "searcher-state-1.pkl", (1.0, 1.0))
    writer = SnapshotWriter(paths)
    assert writer.save(staging, lambda: b"first")
    assert not writer.save(staging, lambda: b"second")
    assert restore_snapshot(paths) == b"first"


def test_without_a_snapshot_nothing_is_touched(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path)
    paths.tune.mkdir()
    (paths.tune / "experiment_state-1.json").write_text("{}")
    assert not has_trials(SweepPaths(tmp_path / "none"))
    assert has_trials(paths)
    assert restore_snapshot(paths) is None
    assert (paths.tune / "experiment_state-1.json").read_text() == "{}"


def test_a_full_disk_leaves_the_previous_state_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    (staging / "searcher-state-1.pkl").write_text("old")
    SnapshotWriter(paths).save(staging, lambda: b"old")
    (staging / "searcher-state-1.pkl").write_text("new")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "writestr", fail)
        with pytest.raises(OSError, match="No space left"):
            SnapshotWriter(paths).save(staging, lambda: b"new")
    archives = {paths.tune_snapshot.name, paths.tune_snapshot_before.name}
    assert {file.name for file in paths.root.iterdir()} == {"tune", *archives}
    assert restore_snapshot(paths) == b"old"


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    for text in ("old", "new"):
        (staging / "searcher-state-1.pkl").write_text(text)
        SnapshotWriter(paths).save(staging, text.encode)
    whole, before = paths.tune_snapshot.read_bytes(), paths.tune_snapshot_before.read_bytes()
    for damaged in damaged_texts(whole, step=1):
        paths.tune_snapshot.write_bytes(damaged)
        paths.tune_snapshot_before.write_bytes(before)
        said: list[str] = []
        restored = restore_snapshot(paths, said.append)
        if restored == b"new":  # the byte is one that nobody reads, such as a file's time
            assert not said
        else:
            assert restored == b"old"
            assert "the one before it is looked for" in said[0]
            assert (paths.tune / "searcher-state-0000-restored.pkl").read_text() == "old"
            assert paths.tune_snapshot.read_bytes() == before


def test_without_a_whole_state_tunes_own_files_stay(tmp_path: Path) -> None:
    paths, staging = SweepPaths(tmp_path / "sweep"), tmp_path / "staging"
    paths.tune.mkdir(parents=True)
    staging.mkdir()
    (paths.tune / "searcher-state-1.pkl").write_text("own")
    (staging / "searcher-state-1.pkl").write_text("saved")
    SnapshotWriter(paths).save(staging, lambda: b"rungs")
    paths.tune_snapshot.write_bytes(b"")
    said: list[str] = []
    assert restore_snapshot(paths, said.append) is None
    assert said[-1].startswith("the search continues from Tune's own files")
    assert (paths.tune / "searcher-state-1.pkl").read_text() == "own"


def test_states_that_take_long_are_written_less_often() -> None:
    """With a free 20 ms and a tenth of the time, a state of 120 ms is followed by a pause of 0.9 s."""
    syncer = SimpleNamespace(wait=lambda: None, sync_up=lambda *_: True)
    storage: Any = SimpleNamespace(experiment_driver_staging_path="", experiment_fs_path="", syncer=syncer)
    manager = _ExperimentCheckpointManager(storage=storage, checkpoint_period=0, sync_every_n_trial_checkpoints=None)
    controller = SimpleNamespace(_tune_controller=SimpleNamespace(_checkpoint_manager=manager))
    manager.sync_up_experiment_state(lambda: None)  # the first one imports libraries
    limit_state_writing(controller, free_s=0.02, max_share=0.1, longest_s=5.0)
    written: list[float] = []

    def write(takes_s: float) -> None:
        time.sleep(takes_s)
        written.append(takes_s)

    for takes_s in (0.0, 0.0, 0.12, 0.0, 0.0):
        manager.sync_up_experiment_state(partial(write, takes_s))
    assert written == [0.0, 0.0, 0.12]
    assert manager._checkpoint_period == pytest.approx(0.9, abs=0.5)
    manager._update_auto_checkpoint_time(time_taken=60.0)
    assert manager._checkpoint_period == 5.0
