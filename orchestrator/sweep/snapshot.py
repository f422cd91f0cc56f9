"""A consistent snapshot of Tune's state.

Tune copies its state file by file into the sweep's folder while it runs (ray 2.60, `_ExperimentCheckpointManager`). A
driver that is killed in between leaves an incomplete state, from which Tune starts a new search without a warning. This
module packs the files that Tune has just finished on the driver's machine into one archive, which is replaced in one
atomic step.

Names of state files contain the time at which their driver started, and Tune reads the file whose name sorts last. The
clock may have been set back since then. Restored files therefore get names that sort before any time.
"""

import zipfile
from pathlib import Path

from orchestrator.record import SweepPaths
from orchestrator.record.files import replacing
from orchestrator.upstream import TUNE_STATE_FILES

_SCHEDULER = "scheduler.pkl"
_RESTORED = "0000-restored"
"""Takes the place of the time in the names of restored files."""


def save_snapshot(paths: SweepPaths, staging: Path, scheduler_state: bytes) -> None:
    """Archive the state files in `staging` with the scheduler's state.

    Call it from the thread of Tune's loop, right after Tune has written its files: both states must be of one moment.
    """
    with replacing(paths.tune_snapshot) as building, zipfile.ZipFile(building, "w") as packed:
        for file in _newest_state_files(staging):
            packed.writestr(file.name, file.read_bytes())
        packed.writestr(_SCHEDULER, scheduler_state)


def restore_snapshot(paths: SweepPaths) -> bytes | None:
    """Replace the state files in Tune's folder by the archived ones.

    Returns:
        The scheduler's state; None if there is no archive.
    """
    if not paths.tune_snapshot.is_file():
        return None
    paths.tune.mkdir(exist_ok=True)  # a copy from an object store has none if no trial has saved anything there
    for pattern in TUNE_STATE_FILES:
        for file in paths.tune.glob(pattern):
            file.unlink()
    with zipfile.ZipFile(paths.tune_snapshot) as packed:
        for pattern in TUNE_STATE_FILES:
            if newest := max((name for name in packed.namelist() if Path(name).match(pattern)), default=None):
                (paths.tune / pattern.replace("*", _RESTORED)).write_bytes(packed.read(newest))
        return packed.read(_SCHEDULER)


def has_trials(paths: SweepPaths) -> bool:
    """Return whether Tune's folder holds the state of trials, so that a tuner can be restored."""
    return any(paths.tune.glob(TUNE_STATE_FILES[0]))


def _newest_state_files(folder: Path) -> list[Path]:
    """Return one file of each kind: the one that Tune would read."""
    found = (max(folder.glob(pattern), default=None) for pattern in TUNE_STATE_FILES)
    return [file for file in found if file is not None]
