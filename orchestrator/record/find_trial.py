"""Find the trial that a user has named."""

import difflib
from pathlib import Path

from orchestrator.errors import RecordError
from orchestrator.record.sweep_record import SweepRecord, read_sweep, require_folder


def find_trial(trial: str, output: str | Path = "runs") -> tuple[SweepRecord, str]:
    """Return the sweep and the name of a trial.

    Args:
        trial: the trial's folder, or SWEEP/TRIAL, where SWEEP is the folder of a sweep or its name under `output`.
        output: folder that holds sweeps.

    Raises:
        RecordError: there is no such sweep, or it has no such trial.
    """
    require_folder(trial, output)
    path = Path(trial)
    sweep = path.parent.parent if path.parent.name == "trials" else path.parent
    if sweep == path.parent and "/" not in trial.strip("/"):
        raise RecordError(
            f"{trial}: is not written as SWEEP/TRIAL",
            "Give the trial's folder, or its sweep and its name: runs/demo/TRIAL.",
        )
    record = read_sweep(sweep, output)
    known = known_trials(record)
    if path.name not in known:
        near = difflib.get_close_matches(path.name, known, n=1)
        raise RecordError(
            f"{path.name}: {record.paths.root} has no such trial",
            f"Did you mean {near[0]}?" if near else f"`orchestrator status {record.paths.root}` lists its trials.",
        )
    return record, path.name


def known_trials(record: SweepRecord) -> list[str]:
    """Return the trials of a sweep: those that have begun, and those that were added and have not begun."""
    added = [name for name in record.info.added if record.paths.trial(name).added.is_file()]
    return list(dict.fromkeys([*record.paths.trial_ids(), *added]))
