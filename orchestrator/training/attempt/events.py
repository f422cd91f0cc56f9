"""What happens to a trial, told by the process that trains it to the one that keeps its books. Plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import FailureCause
from orchestrator.storage import storage_fault


@dataclass(frozen=True)
class Event:
    """Something that has happened, and is on disk as far as files belong to it."""

    seconds: float
    """Of this attempt so far."""
    gpu_seconds: float
    """GPU time of this attempt so far, as `TrialResult.gpu_seconds` counts it; 0 on a CPU."""
    peak_memory_gib: float
    """Most memory that the process has held."""


@dataclass(frozen=True)
class Noted(Event):
    """Something is known now: fields of `TrialResult` and their values."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class Logged(Event):
    """Training figures of some steps."""

    step: int
    tokens: int
    """Real tokens trained on in this attempt."""
    training_s: float
    """Seconds of training in this attempt; evaluations and saving left out."""
    values: dict[str, float]


@dataclass(frozen=True)
class Evaluated(Event):
    """An evaluation."""

    step: int
    tokens: int
    """As in `Logged`."""
    values: dict[str, float]
    adapter: str | None
    """The adapter's folder, relative to the trial's, where this is the best evaluation so far."""
    saves: bool
    """Whether a checkpoint of the same step follows."""


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is complete."""

    step: int
    checkpoint: str
    """Relative to the trial's folder."""


@dataclass(frozen=True)
class Answered(Event):
    """Metrics by generation with the best adapter, after training."""

    values: dict[str, float]


@dataclass(frozen=True)
class Warned(Event):
    """Something went wrong that does not stop the trial."""

    warning: str


@dataclass(frozen=True)
class Completed(Event):
    """All steps are done; nothing more comes."""


@dataclass(frozen=True)
class Failed(Event):
    """The trial has failed for good; nothing more comes."""

    error: str
    remedy: str
    traceback: str | None
    """For the trial's log, where the fault is not one of those that are raised on purpose."""
    cause: FailureCause
    """Whether the trial's own values made it fail, and how."""


@dataclass(frozen=True)
class Left(Event):
    """This attempt has ended without a result, and another may go on; nothing more comes."""

    step: int
    """Steps that were made."""
    lost: str | None
    """The fault from outside that ended it, such as CUDA's or the disk's; None where it was asked to stop."""
    is_storage: bool = False
    """Whether `lost` is a fault of the storage, which every other attempt would meet too until it is mended."""


END = (Completed, Failed, Left)


def lost_by(error: Exception) -> dict[str, Any]:
    """What `Left` says of a fault from outside."""
    return {"lost": f"{type(error).__name__}: {error}", "is_storage": storage_fault(error) is not None}


class LeaseLost(Exception):
    """There is no such lease: it was given up, or is of an earlier process."""


class Listener(Protocol):
    """Whoever hears of a trial, and may end it."""

    @property
    def stopping(self) -> bool:
        """Whether the trial is to end; asked after each step and each event."""

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a trial that is to end is to write a checkpoint first, for it will go on later."""

    def on_step(self, step: int, total_steps: int) -> None:
        """Called after each optimizer step."""

    def emit(self, event: Event) -> None:
        """Take an event; they come in order."""


class WriteQueue(Protocol):
    """Has jobs done in their order, at once or while training goes on: what writes files, and tells of them."""

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done."""

    def wait(self) -> None:
        """Until all jobs are done."""


class WriteNow:
    """Does each job when it comes."""

    def do(self, job: Callable[[], None]) -> None:
        """Do it now."""
        job()

    def wait(self) -> None:
        """Return: no job waits."""
