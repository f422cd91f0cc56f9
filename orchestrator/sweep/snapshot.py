"""A consistent snapshot of Tune's state.

Tune copies its state file by file into the sweep's folder while it runs (ray 2.60, `_ExperimentCheckpointManager`). A
driver that is killed in between leaves an incomplete state, from which Tune starts a new search without a warning. This
module packs the files that Tune has just finished on the driver's machine into one archive, which is signed and
replaced in one atomic step. The archive before it is kept: a damaged one is passed over. A resume loads nothing else of
Tune's folder: its files are pickles, and others may have written them.

Names of state files contain the time at which their driver started, and Tune reads the file whose name sorts last. The
clock may have been set back since then. Restored files therefore get names that sort before any time.
"""

import io
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths
from orchestrator.record.files import link_or_copy, refuse_links, replacing
from orchestrator.sweep.signature import read_signed, sign_again, write_signed
from orchestrator.upstream import TUNE_PICKLES, TUNE_STATE_FILES

_SCHEDULER = "scheduler.pkl"
_RESTORED = "0000-restored"
"""Takes the place of the time in the names of restored files."""


def save_snapshot(paths: SweepPaths, staging: Path, scheduler_state: bytes) -> None:
    """Archive the state files in `staging` with the scheduler's state.

    Call it from the thread of Tune's loop, right after Tune has written its files: both states must be of one moment.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for file in _newest_state_files(staging):
            packed.writestr(file.name, file.read_bytes())
        packed.writestr(_SCHEDULER, scheduler_state)
    _keep_before(paths)
    write_signed(paths.tune_snapshot, archive.getvalue())


def restore_snapshot(paths: SweepPaths, say: Callable[[str], None] = lambda _: None) -> bytes | None:
    """Replace all that Tune could unpickle in its folder by the newest archive that is whole.

    Args:
        paths: of the sweep.
        say: called with a message about a damaged archive.

    Returns:
        The scheduler's state; None if there is no archive and no trial has begun.

    Raises:
        RecordError: the archives are missing, damaged or not signed with the owner's key, or the folder contains a
            link.
    """
    found = _newest_whole(paths, say)
    _remove_pickles(paths.tune)
    if found is None:
        return None
    paths.tune.mkdir(exist_ok=True)  # a copy from an object store has none if no trial has saved anything there
    with zipfile.ZipFile(io.BytesIO(found)) as packed:
        for pattern in TUNE_STATE_FILES:
            if newest := max((name for name in packed.namelist() if Path(name).match(pattern)), default=None):
                (paths.tune / pattern.replace("*", _RESTORED)).write_bytes(packed.read(newest))
        return packed.read(_SCHEDULER)


def require_signed(paths: SweepPaths, say: Callable[[str], None] = lambda _: None) -> None:
    """Check that a sweep's state can be restored: that its owner has signed one of its archives, if trials have begun.

    Arguments and errors are those of `restore_snapshot`.
    """
    _newest_whole(paths, say)


def trust_snapshot(paths: SweepPaths) -> None:
    """Sign the archives of a sweep with the owner's key, whoever has written them. Damaged ones stay as they are."""
    for path in _archives(paths):
        with suppress(zipfile.BadZipFile, EOFError, OSError), zipfile.ZipFile(path) as packed:
            if packed.testzip() is None:
                sign_again(path)


def has_trials(paths: SweepPaths) -> bool:
    """Return whether Tune's folder holds the state of trials, so that a tuner can be restored."""
    return any(paths.tune.glob(TUNE_STATE_FILES[0]))


def _archives(paths: SweepPaths) -> list[Path]:
    """Return the archives that exist, the newest first."""
    return [path for path in (paths.tune_snapshot, paths.tune_snapshot_before) if path.is_file()]


def _newest_whole(paths: SweepPaths, say: Callable[[str], None]) -> bytes | None:
    """Return the newest archive that is signed by the owner and whole; None if no trial has begun.

    The signature covers every byte, so that it also tells damage. If the last archive is passed over, the one before
    takes its place, so that a damaged one never becomes the one before.

    Raises:
        RecordError: there are archives, but none can be trusted; or trials have begun, and there is none.
    """
    faults: list[RecordError] = []
    for path in _archives(paths):
        try:
            content = read_signed(path)
        except RecordError as error:
            faults.append(error)
            continue
        if faults:
            say(f"{faults[0].message.partition(';')[0]}; the search continues from the state before it")
            path.replace(paths.tune_snapshot)
        return content
    if faults:
        raise faults[0]
    if begun := [each for each in map(paths.trial, paths.trial_ids()) if each.progress.is_file()]:
        raise RecordError(
            f"{paths.tune_snapshot}: is missing, so that the search cannot continue after {begun[0].trial_id}",
            f"Put it back; or begin a new sweep that learns from this one, with --warm-from {paths.root}.",
        )
    return None


def _keep_before(paths: SweepPaths) -> None:
    """Give the present archive a second name, under which it stays when it is replaced."""
    if paths.tune_snapshot.is_file():
        with replacing(paths.tune_snapshot_before) as building:
            building.unlink()
            link_or_copy(paths.tune_snapshot, building)


def _remove_pickles(folder: Path) -> None:
    if folder.is_symlink():
        raise RecordError(f"{folder}: is a symbolic link", "Put the folder itself in its place.")
    refuse_links(folder)
    for pattern in TUNE_PICKLES:
        for file in folder.glob(pattern):
            file.unlink()


def _newest_state_files(folder: Path) -> list[Path]:
    """Return one file of each kind: the one that Tune would read."""
    found = (max(folder.glob(pattern), default=None) for pattern in TUNE_STATE_FILES)
    return [file for file in found if file is not None]
