"""What a trial keeps is on the disk before a name or a record says that it is there."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from one_trial import ENGINES, Tiny, run

from orchestrator.record import SweepPaths, TrialState
from orchestrator.record.files import publish, write_atomic

pytestmark = pytest.mark.slow

Version = tuple[int, int, int]


def version(path: Path) -> Version:
    """Identify a file's present content: its inode, time of change and size."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


class Disk:
    """Follows what has been synced, and lists what a power cut would take although a name on the disk promises it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[Version] = set()
        self.lost: list[str] = []
        """Files that were renamed, or that a record names, without being on the disk."""
        self.unsynced_names: set[int] = set()
        """Inodes of folders with a new name that is not on the disk yet."""
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def followed_fsync(handle: int) -> None:
            found = os.fstat(handle)
            if stat.S_ISDIR(found.st_mode):
                self.unsynced_names.discard(found.st_ino)
            else:
                self.synced.add((found.st_ino, found.st_mtime_ns, found.st_size))
            fsync(handle)

        def followed(renames: Any, source: Any, target: Any) -> None:
            self.check(Path(source))
            if Path(target).name in ("progress.json", "result.json"):
                self.check_record(Path(target).parent)
            renames(source, target)
            self.unsynced_names.add(Path(target).parent.stat().st_ino)

        monkeypatch.setattr(os, "fsync", followed_fsync)
        monkeypatch.setattr(os, "rename", lambda *each, **_: followed(rename, *each))
        monkeypatch.setattr(os, "replace", lambda *each, **_: followed(replace, *each))

    def check(self, path: Path) -> None:
        """Note the files under a path that are not on the disk."""
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        self.lost += [str(file) for file in files if version(file) not in self.synced]

    def check_record(self, trial: Path) -> None:
        """Note what a record of this trial counts on, and is not on the disk."""
        for kept in (trial / "metrics.jsonl", *trial.glob("adapters/step-*")):
            if kept.exists():
                self.check(kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_trial_keeps_survives_a_power_cut(
    tiny: Tiny, folder: SweepPaths, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    synced_checkpoints: set[Version] = set()
    spec = tiny(f"training.engine={engine}")

    from orchestrator.training.attempt import reporter

    seal_checkpoint = reporter.seal_checkpoint

    def followed(checkpoint: Path) -> None:
        seal_checkpoint(checkpoint)
        synced_checkpoints.update(version(file) for file in checkpoint.rglob("*") if file.is_file())

    monkeypatch.setattr(reporter, "seal_checkpoint", followed)
    result = run(spec, folder)
    assert result.state == TrialState.COMPLETE
    assert disk.lost == []
    assert disk.unsynced_names == set()
    assert len(synced_checkpoints) >= 2 * 5
    assert synced_checkpoints <= disk.synced


def test_a_file_that_is_not_synced_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_atomic(tmp_path / "record.json", "{}")
    (tmp_path / "building").mkdir()
    (tmp_path / "building" / "weights").write_text("1")
    publish(tmp_path / "building", tmp_path / "adapter")
    assert (disk.lost, disk.unsynced_names) == ([], set())
    (tmp_path / "other").write_text("2")
    (tmp_path / "other").rename(tmp_path / "weights")
    assert disk.lost == [str(tmp_path / "other")]
    assert disk.unsynced_names == {tmp_path.stat().st_ino}
