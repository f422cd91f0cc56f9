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
from ray.tune.execution.experiment_state import _ExperimentCheckpointManager

from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths
from orchestrator.sweep.snapshot import SnapshotWriter, has_trials, require_signed, restore_snapshot, trust_snapshot
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
    assert restore_snapshot(paths) == b"rungs"
    restored = {name.replace("-1.", "-0000-restored."): text for name, text in whole.items()}
    assert {file.name: file.read_text() for file in paths.tune.iterdir()} == restored
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
    SnapshotWriter(paths).save(staging, lambda: b"own")
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
    SnapshotWriter(paths).save(staging, lambda: b"own")
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
    SnapshotWriter(paths).save(staging, lambda: b"old")
    (staging / "searcher-state-1.pkl").write_text("new")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "writestr", fail)
        with pytest.raises(OSError, match="No space left"):
            SnapshotWriter(paths).save(staging, lambda: b"new")
    assert {file.name for file in paths.root.iterdir()} == {"tune", paths.tune_snapshot.name}
    assert restore_snapshot(paths) == b"old"


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
