"""The log of faults: which trials and workers have been lost or ended, when, why, and what followed."""

from pydantic import Field

from orchestrator.record.checked import append_record, read_lines
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
    append_record(paths.faults, fault)


def read_faults(paths: SweepPaths) -> list[Fault]:
    """Return all faults of a sweep, in order. Lines that are cut or damaged are left out: nothing depends on them."""
    return read_lines(Fault, paths.faults).records
