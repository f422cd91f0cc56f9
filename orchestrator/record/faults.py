"""The log of faults: which trials and workers have been lost or ended, when, why, and what followed."""

from pydantic import Field, ValidationError

from orchestrator.documents import MAX_LINES_BYTES
from orchestrator.record.files import append_line
from orchestrator.record.models import Record, time_now
from orchestrator.record.names import Name
from orchestrator.record.paths import SweepPaths


class Fault(Record):
    """One line of faults.jsonl."""

    time: str = Field(default_factory=time_now)
    """Time in UTC, ISO 8601."""
    trial_id: Name | None = None
    """Trial whose attempt has ended; None for a fault of a worker."""
    worker: str | None = None
    """The worker's process as `host:pid`, where it is known; None for a fault of a trial."""
    step: int | None = None
    """Step of the checkpoint from which the trial continues: 0 without one; None for a fault of a worker."""
    cause: str
    then: str
    """What followed, such as `restarts from step 8`."""

    def __str__(self) -> str:
        subject = f"trial {self.trial_id}" if self.trial_id else f"worker {self.worker or '(not started)'}"
        return f"{subject}: {self.cause}; {self.then}"


def append_fault(paths: SweepPaths, fault: Fault) -> None:
    """Append one line to the log."""
    append_line(paths.faults, fault.model_dump_json())


def read_faults(paths: SweepPaths) -> list[Fault]:
    """Return all faults of a sweep, in order. A line that cannot be read is left out: nothing depends on it."""
    if not paths.faults.is_file():
        return []
    faults = []
    with paths.faults.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(MAX_LINES_BYTES).splitlines()
    for line in lines:
        try:
            faults.append(Fault.model_validate_json(line))
        except ValidationError:
            continue
    return faults
