"""What Tune tells of a trial, in our terms."""

import copy
from typing import Any

from orchestrator.record import SweepPaths

COMPLETE = "complete"
"""In a report: the trial has done all its steps."""


def set_folder(trial: Any, paths: SweepPaths) -> None:
    """Point a Tune trial at the folder in which its sweep lies now.

    The searcher's saved state holds the folder of the driver that began the sweep, and every trial that it makes after
    a resume gets that one (ray 2.60, `SearchGenerator.create_trial_if_possible`, `_TrialIterator.create_trial`). In a
    sweep that was moved the trial would fail there, and in a copy it would write into the original.
    """
    storage = copy.copy(trial.storage)
    storage.storage_fs_path = str(paths.root)
    trial.set_storage(storage)


def plain_values(config: dict[str, Any]) -> dict[str, Any]:
    """Searched values as JSON types: samplers give numpy scalars."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in config.items()}
