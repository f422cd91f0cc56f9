"""Tune's state, whole at every moment.

Tune copies its state file by file into the sweep's folder while it goes on (ray 2.60, `_ExperimentCheckpointManager`):
a driver that is killed in between leaves a torn one, from which Tune begins a new search without a word. Here the files
that Tune has just finished on this machine go into one archive, which is replaced in one step.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

from orchestrator.record import SweepPaths
from orchestrator.record.files import replacing

_SCHEDULER = "scheduler.pkl"
_STATE = ("experiment_state-*.json", "search_gen_state-*.json", "searcher-state-*.pkl", "basic-variant-state-*.json")


def keep_snapshot(staging: Path, paths: SweepPaths, scheduler: Callable[[], bytes]) -> None:
    """Archive the state files in `staging`, if they have changed, and the scheduler's state.

    Call it from Tune's own thread, which writes them.
    """
    files = _state_files(staging)
    archive = paths.tune_snapshot
    changed = max((file.stat().st_mtime_ns for file in files), default=0)
    if not files or (archive.is_file() and archive.stat().st_mtime_ns > changed):
        return
    with replacing(archive) as building, zipfile.ZipFile(building, "w") as packed:
        for file in files:
            packed.write(file, file.name)
        packed.writestr(_SCHEDULER, scheduler())


def put_snapshot_back(paths: SweepPaths) -> bytes | None:
    """Replace the state files in Tune's folder by the archived ones, if there are any.

    Returns:
        The scheduler's state.
    """
    if not paths.tune_snapshot.is_file():
        return None
    for file in _state_files(paths.tune):
        file.unlink()
    with zipfile.ZipFile(paths.tune_snapshot) as packed:
        packed.extractall(paths.tune, [name for name in packed.namelist() if name != _SCHEDULER])
        return packed.read(_SCHEDULER)


def _state_files(folder: Path) -> list[Path]:
    return [file for pattern in _STATE for file in folder.glob(pattern)]
