"""A consistent snapshot of Tune's state.

Tune copies its state file by file into the sweep's folder while it runs (ray 2.60, `_ExperimentCheckpointManager`). A
driver that is killed in between leaves an incomplete state, from which Tune starts a new search without a warning. This
module packs the files that Tune has just finished on the driver's machine into one archive, which is replaced in one
atomic step. The archive before it is kept: a damaged one is passed over.

Names of state files contain the time at which their driver started, and Tune reads the file whose name sorts last. The
clock may have been set back since then. Restored files therefore get names that sort before any time.
"""

import io
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from orchestrator.record import SweepPaths
from orchestrator.record.files import link_or_copy, replacing
from orchestrator.upstream import TUNE_STATE_FILES

_SCHEDULER = "scheduler.pkl"
_RESTORED = "0000-restored"
"""Takes the place of the time in the names of restored files."""

_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, ValueError)
"""What `zipfile` raises for a damaged archive in memory."""

_TICK_NS = 10_000_000
"""Two changes of a file within this time may get the same time of change (Linux: 1 to 10 ms)."""


class SnapshotWriter:
    """Saves snapshots of one driver."""

    def __init__(self, paths: SweepPaths) -> None:
        self._paths = paths
        self._saved: list[tuple[str, int, int]] = []
        """Name, time of change and size of each file in the last snapshot; empty if they may change at that time."""

    def save(self, staging: Path, scheduler_state: Callable[[], bytes]) -> bool:
        """Archive the state files in `staging` and the scheduler's state, if the files have changed since then.

        Call it from the thread of Tune's loop, which writes the files.

        Returns:
            Whether the archive holds the present state.
        """
        began_ns = time.time_ns()
        files = _newest_state_files(staging)
        found = [(file.name, stat.st_mtime_ns, stat.st_size) for file in files for stat in [file.stat()]]
        if not files or (found == self._saved and self._paths.tune_snapshot.is_file()):
            return False
        _keep_before(self._paths)
        with replacing(self._paths.tune_snapshot) as building, zipfile.ZipFile(building, "w") as packed:
            for file in files:
                packed.writestr(file.name, file.read_bytes())
            packed.writestr(_SCHEDULER, scheduler_state())
        changed_ns = max(changed_ns for _, changed_ns, _ in found)
        self._saved = found if began_ns > changed_ns + _TICK_NS else []
        return True


def restore_snapshot(paths: SweepPaths, say: Callable[[str], None] = lambda _: None) -> bytes | None:
    """Replace the state files in Tune's folder by those of the newest whole archive.

    Args:
        paths: of the sweep.
        say: called with a message about each damaged archive.

    Returns:
        The scheduler's state; None if there is no whole archive. Tune then continues from its own files.
    """
    archives = [path for path in (paths.tune_snapshot, paths.tune_snapshot_before) if path.is_file()]
    for path in archives:
        content = path.read_bytes()
        try:
            files = _unpacked(content)
        except _DAMAGES as error:
            say(f"{path}: the state of the search is damaged, and the one before it is looked for: {error}")
            continue
        scheduler_state = files.pop(_SCHEDULER)
        for pattern in TUNE_STATE_FILES:
            for file in paths.tune.glob(pattern):
                file.unlink()
            if newest := max((name for name in files if Path(name).match(pattern)), default=None):
                (paths.tune / pattern.replace("*", _RESTORED)).write_bytes(files[newest])
        path.replace(paths.tune_snapshot)  # so that a damaged one does not become the one before
        return scheduler_state
    if archives:
        say("the search continues from Tune's own files; its stopping rule hears all reports again")
    return None


def _unpacked(archive: bytes) -> dict[str, bytes]:
    """Return the files of an archive, whose checksums are checked.

    Raises:
        KeyError: the scheduler's state is missing.
        Exception: one of `_DAMAGES`: the archive is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        return {name: packed.read(name) for name in [*packed.namelist(), _SCHEDULER]}


def _keep_before(paths: SweepPaths) -> None:
    """Give the present archive a second name, under which it stays when it is replaced."""
    if paths.tune_snapshot.is_file():
        with replacing(paths.tune_snapshot_before) as building:
            building.unlink()
            link_or_copy(paths.tune_snapshot, building)


def has_trials(paths: SweepPaths) -> bool:
    """Return whether Tune's folder holds the state of trials, so that a tuner can be restored."""
    return any(paths.tune.glob(TUNE_STATE_FILES[0]))


def _newest_state_files(folder: Path) -> list[Path]:
    """Return one file of each kind: the one that Tune would read."""
    found = (max(folder.glob(pattern), default=None) for pattern in TUNE_STATE_FILES)
    return [file for file in found if file is not None]
