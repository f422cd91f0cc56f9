"""Helpers for Tune's trials, shared by search, schedulers and workers."""

import copy
from typing import Any

from orchestrator.record import SweepPaths

COMPLETE = "complete"
"""Key of a report: whether the trial has done all its steps."""


def set_folder(trial: Any, paths: SweepPaths) -> None:
    """Point a Tune trial at the folder in which its sweep is now.

    The saved state of the searcher holds the folder of the driver that started the sweep, and every trial that it makes
    after a resume gets that folder (ray 2.60, `SearchGenerator.create_trial_if_possible`,
    `_TrialIterator.create_trial`). In a moved sweep the trial would fail there; in a copied sweep it would write into
    the original.
    """
    storage = copy.copy(trial.storage)
    storage.storage_fs_path = str(paths.root)
    trial.set_storage(storage)


def plain_values(config: dict[str, Any]) -> dict[str, Any]:
    """Convert searched values to JSON types: samplers return NumPy scalars."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in config.items()}
