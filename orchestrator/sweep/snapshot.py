"""A consistent snapshot of Tune's state.

Tune copies its state file by file into the sweep's folder while it runs (ray 2.60, `_ExperimentCheckpointManager`). A
driver that is killed in between leaves an incomplete state, from which Tune starts a new search without a warning. This
module packs the files that Tune has just finished on the driver's machine into one archive, which is replaced in one
atomic step.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

from orchestrator.record import SweepPaths
from orchestrator.record.files import replacing
from orchestrator.upstream import TUNE_STATE_FILES

_SCHEDULER = "scheduler.pkl"


def save_snapshot(staging: Path, paths: SweepPaths, scheduler_state: Callable[[], bytes]) -> None:
    """Archive the state files in `staging` and the scheduler's state, if the files have changed.

    Call it from the thread of Tune's loop, which writes the files.
    """
    files = _state_files(staging)
    archive = paths.tune_snapshot
    changed = max((file.stat().st_mtime_ns for file in files), default=0)
    if not files or (archive.is_file() and archive.stat().st_mtime_ns > changed):
        return
    with replacing(archive) as building, zipfile.ZipFile(building, "w") as packed:
        for file in files:
            packed.write(file, file.name)
        packed.writestr(_SCHEDULER, scheduler_state())


def restore_snapshot(paths: SweepPaths) -> bytes | None:
    """Replace the state files in Tune's folder by the archived ones.

    Returns:
        The scheduler's state; None if there is no archive.
    """
    if not paths.tune_snapshot.is_file():
        return None
    for file in _state_files(paths.tune):
        file.unlink()
    with zipfile.ZipFile(paths.tune_snapshot) as packed:
        packed.extractall(paths.tune, [name for name in packed.namelist() if name != _SCHEDULER])
        return packed.read(_SCHEDULER)


def _state_files(folder: Path) -> list[Path]:
    return [file for pattern in TUNE_STATE_FILES for file in folder.glob(pattern)]
