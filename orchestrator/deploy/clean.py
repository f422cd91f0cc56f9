"""Free the disk of what a sweep no longer needs: checkpoints of ended trials, and weights of adapters not chosen."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.adapters.bundle import SCORES
from orchestrator.deploy.finished import ChosenTrial, FinishedSweep, point_of
from orchestrator.errors import RequestError
from orchestrator.record import OPEN, SweepPaths, SweepRecord, TrialResult, is_finished, read_sweep
from orchestrator.record.absent import AbsentAdapter, read_absent, write_absent
from orchestrator.record.files import write_atomic
from orchestrator.record.lock import driver_state, only_driver
from orchestrator.record.manifest import MANIFEST
from orchestrator.record.models import time_now

_KEPT = (SCORES, MANIFEST)
"""Files of a removed adapter that stay: `best` compares its rows, whose checksum the manifest holds."""


@dataclass(frozen=True)
class Freed:
    """What a clean of one sweep removes."""

    checkpoints: list[Path]
    """Files of checkpoints."""
    adapters: dict[str, list[Path]]
    """Trial id -> files of its adapter."""
    why_adapters_stay: str | None
    """Why no further adapter is removed, if so."""

    @property
    def files(self) -> list[Path]:
        return [*self.checkpoints, *(file for files in self.adapters.values() for file in files)]

    @property
    def num_bytes(self) -> int:
        return _size(self.files)


def what_to_free(record: SweepRecord, num_kept: int) -> Freed:
    """Find what a sweep no longer needs. Nothing is changed.

    Args:
        record: the sweep.
        num_kept: number of best trials whose adapters stay, besides those that the choice of the best needs.

    Raises:
        RequestError: a driver runs the sweep.
        RecordError: a record is damaged.
    """
    _require_no_driver(record.paths)
    return _find(record, num_kept)


def _require_no_driver(paths: SweepPaths) -> None:
    if driver_state(paths).is_running:
        raise RequestError(
            f"{paths.root}: a driver is running this sweep, so that nothing is removed",
            "Run `orchestrator clean` again once the sweep has ended.",
        )


def _find(record: SweepRecord, num_kept: int) -> Freed:
    trials = record.trials()
    is_over = is_finished(record, trials)
    folders = [record.paths.trial(trial.trial_id).checkpoints for trial in trials if trial.state not in OPEN]
    if is_over:
        folders += [record.paths.trial(trial.trial_id).exploit_checkpoints for trial in trials]
    why = None if is_over else "something is left to run, or no trial has an adapter"
    kept = {trial.trial_id for trial in trials}
    if is_over:
        best = FinishedSweep(record).best()
        if best.damaged:
            why = f"the adapter of trial {next(iter(best.damaged))} is damaged"
        else:
            kept = _needed(record, trials, num_kept, best)
    removed = read_absent(record.paths)  # an interrupted clean is finished, whatever is to be kept now
    adapters = {
        trial.trial_id: files
        for trial in trials
        if trial.best is not None
        and (trial.trial_id in removed or trial.trial_id not in kept)
        and (files := [file for file in _files(record, record.adapter_path(trial)) if file.name not in _KEPT])
    }
    return Freed([file for folder in folders for file in _files(record, folder)], adapters, why)


def clean(record: SweepRecord, num_kept: int, announced: Freed) -> None:
    """Remove what `what_to_free` has found. After a kill at any point, the same call again finishes the work.

    Args:
        record: the sweep.
        num_kept: as for `what_to_free`.
        announced: what the user has agreed to.

    Raises:
        RequestError: a driver runs the sweep, or it has changed since `announced`.
    """
    _require_no_driver(record.paths)
    with _held(record.paths):
        if _find(read_sweep(record.paths.root), num_kept) != announced:
            raise RequestError(
                f"{record.paths.root}: the sweep has changed meanwhile", "Run `orchestrator clean` again."
            )
        removed = read_absent(record.paths)
        new = {
            trial_id: AbsentAdapter(
                reason="removed by clean", time=time_now(), num_bytes=_size(files), num_kept=num_kept
            )
            for trial_id, files in announced.adapters.items()
            if trial_id not in removed
        }
        if new:
            write_absent(record.paths, removed | new)
        for file in announced.files:
            file.unlink(missing_ok=True)
        for trial_id in record.paths.trial_ids():
            paths = record.paths.trial(trial_id)
            for folder in (paths.checkpoints, paths.exploit_checkpoints, paths.adapters):
                _remove_empty(folder)


@contextmanager
def _held(paths: SweepPaths) -> Iterator[None]:
    """Hold the sweep, and leave the name of a killed driver as it was: `resume` ends the processes that it left."""
    with suppress(FileNotFoundError):
        beat = paths.driver.stat().st_mtime
    killed = None
    try:
        with only_driver(paths) as killed:
            yield
    finally:
        if killed is not None:
            write_atomic(paths.driver, killed.model_dump_json())
            os.utime(paths.driver, (beat, beat))


def _needed(record: SweepRecord, trials: list[TrialResult], num_kept: int, best: ChosenTrial) -> set[str]:
    """Return the trials whose adapters stay in a sweep that has ended; `best` is the one that it recommends."""
    choices = [best, FinishedSweep(record, uses_repeats=False).best()]
    needed = {trial.trial_id for trial in FinishedSweep(record).top(num_kept)}
    for choice in choices:
        needed |= {choice.trial.trial_id, choice.recommendation.leader.trial.trial_id}
        needed |= {rival.candidate.trial.trial_id for rival in choice.recommendation.tied}
    if score := record.test_score():
        needed.add(score.trial_id)
    others = [record.paths.repeats, *sorted(record.paths.audits.glob("*"))]
    again = [trial for root in others if (root / "sweep.json").is_file() for trial in read_sweep(root).trials()]
    points = {point_of(trial) for trial in again}
    return needed | {trial.trial_id for trial in trials if point_of(trial) in points}


def _files(record: SweepRecord, folder: Path) -> list[Path]:
    """Return the files in a folder of the sweep; none if links lead to it, or out of the sweep."""
    root = record.paths.root
    if not folder.is_dir() or folder.resolve() != root.resolve() / folder.relative_to(root):
        return []
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _size(files: list[Path]) -> int:
    return sum(file.lstat().st_size for file in files)


def _remove_empty(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):  # it has files
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()
