"""Checkpoints of a trial: a manifest seals a complete one, and a trial that continues verifies it first."""

from pathlib import Path

from orchestrator.record.checked import DamagedError, Lines, read_lines, read_record
from orchestrator.record.files import REPLACED, sync
from orchestrator.record.manifest import folder_fault, seal_folder
from orchestrator.record.models import MetricPoint, TrialResult
from orchestrator.record.paths import TrialPaths
from orchestrator.spec import TrialConfig


def seal_checkpoint(folder: Path) -> None:
    """Write the manifest of a complete checkpoint. A record may name it then: the disk holds all of it."""
    seal_folder(folder)
    sync(folder.parent)


def step_of(checkpoint: str | Path) -> int:
    """Return the step of a checkpoint, which its name ends with."""
    return int(str(checkpoint).rpartition("-")[2])


def checkpoint_steps(paths: TrialPaths) -> list[int]:
    """Return the steps of all checkpoints of a trial, whole or not, the newest first."""
    return sorted((step_of(folder) for folder in paths.checkpoints.glob("checkpoint-*")), reverse=True)


def resumable(paths: TrialPaths, config: TrialConfig) -> TrialResult | None:
    """Return a trial as it was at its newest whole checkpoint; None if it must start from the beginning.

    Step and tokens are those of the checkpoint: what was done after it will be done again. The best adapter may be
    from a later step: it is complete, and will be measured again with the same value.
    """
    return _newest_whole(paths, config)[0]


def start_of(paths: TrialPaths, new: TrialResult) -> TrialResult:
    """Return the start of the next attempt at a trial: its newest whole checkpoint, or else the beginning.

    Its warnings say which checkpoints were passed over, and why.

    Args:
        paths: of the trial.
        new: the trial as one that has not begun.
    """
    found, faults = _newest_whole(paths, new.config)
    if not faults:
        return found or new
    then = f"continued from checkpoint-{found.step}" if found else "began anew"
    start = found or new
    return start.model_copy(update={"warnings": [*start.warnings, *(f"{fault}; {then}" for fault in faults)]})


def _has_points(points: Lines[MetricPoint], step: int) -> bool:
    """Return whether all points up to a step are there. Before a damaged line, those of its last step may be lost."""
    steps = [point.step for point in points.records[: points.num_before]]
    return step in steps and (points.fault is None or steps[-1] > step)


def _adapter_fault(adapter: Path) -> str | None:
    """Return what is wrong with an adapter. One that was being replaced at a kill is put back later."""
    replaced = adapter.with_name(f"{REPLACED}{adapter.name}")
    return folder_fault(adapter if adapter.is_dir() or not replaced.is_dir() else replaced)


def _newest_whole(paths: TrialPaths, config: TrialConfig) -> tuple[TrialResult | None, list[str]]:
    """Return a trial as at its newest whole checkpoint, and what was wrong with the later ones."""
    if not paths.progress.is_file():
        return None, []
    try:
        progress = read_record(TrialResult, paths.progress)
    except DamagedError as error:
        return None, [error.message]
    if progress.config != config or progress.checkpoint is None:
        return None, []
    last = step_of(progress.checkpoint)
    points = read_lines(MetricPoint, paths.metrics)
    whole = points.records[: points.num_before]
    best = progress.best
    best_fault = _adapter_fault(paths.root / best.adapter) if best else None
    faults = []
    for step in dict.fromkeys([last, *(step for step in checkpoint_steps(paths) if step < last)]):
        name = f"checkpoints/checkpoint-{step}"
        is_adopted = progress.parent is not None and progress.parent.endswith(f"/{name}")
        if fault := folder_fault(paths.root / name):
            faults.append(f"{name}: {fault}")
        elif not is_adopted and not _has_points(points, step):
            faults.append(f"{name}: metrics.jsonl has lost points up to this step ({points.fault or 'it was cut'})")
        elif best and best_fault and best.step <= step:
            faults.append(f"{name}: the best adapter of an earlier step, {best.adapter}, {best_fault}")
        else:
            kept = [point for point in whole if point.step <= step]
            update: dict[str, object] = {"checkpoint": name, "best": None if best_fault else best}
            if progress.step != step:
                update |= {"step": step, "tokens": kept[-1].tokens if kept else 0}
            return progress.model_copy(update=update), faults
    return None, faults
