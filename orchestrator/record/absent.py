"""The record of adapters that a sweep's folder no longer holds, and why."""

from typing import Literal

from orchestrator.documents import read_text
from orchestrator.errors import RecordError
from orchestrator.record.files import write_atomic
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
        RecordError: the record is damaged.
    """
    try:
        return AbsentAdapters.model_validate_json(read_text(paths.absent)).trials
    except FileNotFoundError:
        return {}
    except ValueError as error:  # pydantic's ValidationError is one
        raise RecordError(f"{paths.absent}: the record is damaged or of another version: {error}") from error


def write_absent(paths: SweepPaths, trials: dict[str, AbsentAdapter]) -> None:
    """Write the record; it has reached the disk when this returns."""
    write_atomic(paths.absent, AbsentAdapters(trials=trials).model_dump_json(indent=2) + "\n")


def require_present(paths: SweepPaths, trial_id: str) -> None:
    """Check that a trial's adapter was not removed.

    Raises:
        AbsentError: it was.
    """
    if absent := read_absent(paths).get(trial_id):
        raise AbsentError(
            f"{trial_id}: its adapter was removed by `orchestrator clean` on {absent.time[:10]}; "
            f"it was not among the {absent.num_kept} best",
            f"`orchestrator best {paths.root}` names one that is there.",
        )
