"""The record of adapters that a sweep's folder no longer holds, and why."""

from typing import Literal

from orchestrator.errors import RecordError
from orchestrator.record.checked import DamagedError, read_record, write_record
from orchestrator.record.models import Record
from orchestrator.record.paths import SweepPaths


class AbsentAdapter(Record):
    """Why a trial's adapter is not in the sweep's folder."""

    reason: Literal["removed by clean"]
    time: str
    """When it was removed, in UTC, ISO 8601."""
    num_bytes: int
    """Bytes of the removed files."""
    num_kept: int
    """Number of best trials whose adapters stayed."""


class AbsentAdapters(Record):
    """The content of `absent.json`."""

    trials: dict[str, AbsentAdapter]
    """Trial id -> why its adapter is absent."""


class AbsentError(RecordError):
    """An adapter was removed on purpose: it is not damaged."""


def read_absent(paths: SweepPaths) -> dict[str, AbsentAdapter]:
    """Return the adapters that were removed from a sweep's folder, by trial.

    Raises:
        DamagedError: the record is damaged.
    """
    try:
        return read_record(AbsentAdapters, paths.absent).trials
    except FileNotFoundError:
        return {}


def write_absent(paths: SweepPaths, trials: dict[str, AbsentAdapter]) -> None:
    """Write the record; it has reached the disk when this returns."""
    write_record(paths.absent, AbsentAdapters(trials=trials))


def require_present(paths: SweepPaths, trial_id: str) -> None:
    """Check that a trial's adapter was not removed.

    Raises:
        AbsentError: it was.
    """
    try:
        absent = read_absent(paths).get(trial_id)
    except DamagedError:  # `record.damage` names it; a removed adapter then counts as missing
        return
    if absent:
        raise AbsentError(
            f"{trial_id}: its adapter was removed by `orchestrator clean` on {absent.time[:10]}; "
            f"it was not among the {absent.num_kept} best",
            f"`orchestrator best {paths.root}` names one that is there.",
        )
