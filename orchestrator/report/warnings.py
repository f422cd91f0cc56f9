"""Collect the warnings of trials, each of them once."""

from collections.abc import Sequence

from orchestrator.record import TrialResult


def distinct_warnings(trials: Sequence[TrialResult]) -> dict[str, tuple[str, int]]:
    """Group warnings that differ only in the trial's id.

    Returns:
        The warning without the id -> the first trial's warning, and the number of trials that have it.
    """
    found: dict[str, tuple[str, int]] = {}
    for trial in trials:
        for warning in trial.warnings:
            key = warning.replace(trial.trial_id, "")
            first, number = found.get(key, (warning, 0))
            found[key] = first, number + 1
    return found
