"""A consistent snapshot of Tune's state.

Tune copies its state file by file into the sweep's folder while it runs (ray 2.60, `_ExperimentCheckpointManager`). A
driver that is killed in between leaves an incomplete state, from which Tune starts a new search without a warning. This
module packs the files that Tune has just finished on the driver's machine into one archive, which is signed and
replaced in one atomic step. A resume loads nothing else of Tune's folder: its files are pickles, and others may have
written them.

Names of state files contain the time at which their driver started, and Tune reads the file whose name sorts last. The
clock may have been set back since then. Restored files therefore get names that sort before any time.
"""

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths
from orchestrator.record.files import refuse_links
from orchestrator.sweep.signature import read_signed, sign_again, write_signed
from orchestrator.upstream import TUNE_PICKLES, TUNE_STATE_FILES

_SCHEDULER = "scheduler.pkl"
_RESTORED = "0000-restored"
"""Takes the place of the time in the names of restored files."""

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
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as packed:
            for file in files:
                packed.writestr(file.name, file.read_bytes())
            packed.writestr(_SCHEDULER, scheduler_state())
        write_signed(self._paths.tune_snapshot, archive.getvalue())
        changed_ns = max(changed_ns for _, changed_ns, _ in found)
        self._saved = found if began_ns > changed_ns + _TICK_NS else []
        return True


def restore_snapshot(paths: SweepPaths) -> bytes | None:
    """Replace all that Tune could unpickle in its folder by the archived state.

    Returns:
        The scheduler's state; None if there is no archive and no trial has begun.

    Raises:
        RecordError: the archive is missing or not signed with the owner's key, or the folder contains a link.
    """
    if not paths.tune_snapshot.is_file():
        if begun := [each for each in map(paths.trial, paths.trial_ids()) if each.progress.is_file()]:
            raise RecordError(
                f"{paths.tune_snapshot}: is missing, so that the search cannot continue after {begun[0].trial_id}",
                f"Put it back; or begin a new sweep that learns from this one, with --warm-from {paths.root}.",
            )
        _remove_pickles(paths.tune)
        return None
    archive = io.BytesIO(read_signed(paths.tune_snapshot))
    _remove_pickles(paths.tune)
    with zipfile.ZipFile(archive) as packed:
        for pattern in TUNE_STATE_FILES:
            if newest := max((name for name in packed.namelist() if Path(name).match(pattern)), default=None):
                (paths.tune / pattern.replace("*", _RESTORED)).write_bytes(packed.read(newest))
        return packed.read(_SCHEDULER)


def require_signed(paths: SweepPaths) -> None:
    """Check that the owner has signed the archive of a sweep, if it has one.

    Raises:
        RecordError: it is signed with another key, not signed, or has changed.
    """
    if paths.tune_snapshot.is_file():
        read_signed(paths.tune_snapshot)


def trust_snapshot(paths: SweepPaths) -> None:
    """Sign the archive of a sweep with the owner's key, whoever has written it."""
    if paths.tune_snapshot.is_file():
        sign_again(paths.tune_snapshot)


def _remove_pickles(folder: Path) -> None:
    if folder.is_symlink():
        raise RecordError(f"{folder}: is a symbolic link", "Put the folder itself in its place.")
    refuse_links(folder)
    for pattern in TUNE_PICKLES:
        for file in folder.glob(pattern):
            file.unlink()


def has_trials(paths: SweepPaths) -> bool:
    """Return whether Tune's folder holds the state of trials, so that a tuner can be restored."""
    return any(paths.tune.glob(TUNE_STATE_FILES[0]))


def _newest_state_files(folder: Path) -> list[Path]:
    """Return one file of each kind: the one that Tune would read."""
    found = (max(folder.glob(pattern), default=None) for pattern in TUNE_STATE_FILES)
    return [file for file in found if file is not None]
