"""The events of a trial, as plain data. The training process sends them to the process that records them."""

from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import FailureCause
from orchestrator.storage import storage_fault
from orchestrator.tracking.secrets import hide_secrets


@dataclass(frozen=True)
class Event:
    """Something that has happened. Files that belong to it are on disk."""

    seconds: float
    """Seconds of this attempt so far."""
    gpu_seconds: float
    """GPU time of this attempt so far, as `TrialResult.gpu_seconds` counts it; 0 on a CPU."""
    peak_memory_gib: float
    """Most memory that the process has held, in GiB."""


@dataclass(frozen=True)
class Noted(Event):
    """Some fields of `TrialResult` are known now."""

    fields: dict[str, Any]
    """The values by the names of the fields."""


@dataclass(frozen=True)
class Logged(Event):
    """Training metrics of one or more steps."""

    step: int
    tokens: int
    """Tokens trained on in this attempt, without padding."""
    training_s: float
    """Seconds of training in this attempt, without evaluations and saving."""
    values: dict[str, float]


@dataclass(frozen=True)
class Stepped(Event):
    """The steps made by now, between two `Logged`. Only views show it; it is no part of the record."""

    step: int


@dataclass(frozen=True)
class Evaluated(Event):
    """An evaluation on the held-out rows."""

    step: int
    tokens: int
    """The same as in `Logged`."""
    values: dict[str, float]
    adapter: str | None
    """The adapter's folder, relative to the trial's, if this is the best evaluation so far."""
    saves: bool
    """Whether a checkpoint of the same step follows."""


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is complete."""

    step: int
    checkpoint: str
    """Its folder, relative to the trial's."""
    lacks_evaluation: bool = False
    """Whether its step was to be evaluated and was not, as in `TrialResult.lacks_evaluation`."""


@dataclass(frozen=True)
class Answered(Event):
    """Metrics of generated answers, by the best adapter, after training."""

    values: dict[str, float]


@dataclass(frozen=True)
class Warned(Event):
    """Something went wrong that does not stop the trial."""

    warning: str

    def __post_init__(self) -> None:
        _hide(self, "warning")


@dataclass(frozen=True)
class Completed(Event):
    """All steps are done. This is the last event."""


@dataclass(frozen=True)
class Failed(Event):
    """The trial has failed for good. This is the last event."""

    error: str
    remedy: str
    traceback: str | None
    """For the trial's log; None for errors that are raised on purpose."""
    cause: FailureCause
    """Whether the trial's own values made it fail, and how."""

    def __post_init__(self) -> None:
        _hide(self, "error", "remedy", "traceback")


@dataclass(frozen=True)
class Left(Event):
    """This attempt has ended without a result, and another may continue the trial. This is the last event."""

    step: int
    """Steps that were done."""
    lost: str | None
    """The outside fault that ended it, such as an error of CUDA or of the disk; None if it was asked to stop."""
    is_storage: bool = False
    """Whether `lost` is a fault of the storage. Every other attempt would meet it too until it is repaired."""
    is_memory: bool = False
    """Whether the trial has run out of GPU memory. The next attempt takes less."""
    is_outside: bool = False
    """Whether the whole process has ended its trials, such as before a preemption. The trial is not to blame."""

    def __post_init__(self) -> None:
        _hide(self, "lost")


def _hide(event: Event, *fields: str) -> None:
    """Remove passwords and keys of this process from texts of libraries, before they reach a record or a log."""
    for field in fields:
        if (text := getattr(event, field)) is not None:
            object.__setattr__(event, field, hide_secrets(text))


END = (Completed, Failed, Left)
"""The events that can be an attempt's last one."""


def fault_fields(error: Exception) -> dict[str, Any]:
    """Return the fields `lost` and `is_storage` of `Left` for an outside fault."""
    return {"lost": f"{type(error).__name__}: {error}", "is_storage": storage_fault(error) is not None}


class LeaseLost(Exception):
    """The lease is unknown here: it was given up, or belongs to an earlier process."""


class Listener(Protocol):
    """Receives a trial's events, and may end the trial."""

    @property
    def stopping(self) -> bool:
        """Whether the trial should end; asked after each step and each event."""

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a trial that should end must write a checkpoint first, because it will continue later."""

    def on_step(self, step: int, total_steps: int) -> None:
        """Handle the end of an optimizer step."""

    def on_progress(self) -> None:
        """Note that work goes on between steps: a pass of an evaluation, or the next token of an answer."""

    def emit(self, event: Event) -> None:
        """Receive an event. Events come in order."""
