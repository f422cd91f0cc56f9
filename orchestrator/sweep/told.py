"""What Tune tells of a trial, in our terms."""

from pathlib import Path
from typing import Any

from orchestrator.record import SweepPaths, TrialPaths

COMPLETE = "complete"
"""In a report: the trial has done all its steps."""


def paths_of(trial: Any) -> TrialPaths:
    """Where a Tune trial writes: Tune's own folder lies in the sweep's, which may have been moved."""
    return SweepPaths(Path(trial.storage.experiment_fs_path).parent).trial(trial.trial_id)


def plain_values(config: dict[str, Any]) -> dict[str, Any]:
    """Searched values as JSON types: samplers give numpy scalars."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in config.items()}
