"""Every error this project raises on purpose: what is wrong, and what to do about it.

Exit codes of the commands: 0 done, 1 failed while running, 2 the request is wrong (nothing was started), 3 the sweep
has a best adapter but some of its trials failed; interrupted, so that `resume` goes on: 130 by Ctrl-C, 143 by SIGTERM,
129 by SIGHUP, 74 by a disk that is full or fails.
"""

from typing import ClassVar, Literal

FailureCause = Literal["diverged", "out_of_memory", "configuration", "infrastructure"]
"""Why a trial failed. All but the last are the fault of the trial's own values: the same values would fail again."""


class OrchestratorError(Exception):
    """A fault with its cause and its remedy. Picklable, so that it crosses process borders whole."""

    exit_code = 1
    cause: ClassVar[FailureCause] = "infrastructure"
    """What a trial's record names as the cause when this error ends the trial."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class RequestError(OrchestratorError):
    """What was asked for is wrong: nothing has been started or written. Exit code 2."""

    exit_code = 2


class SpecError(RequestError):
    """An experiment file or an override does not describe a valid sweep."""


class DataError(RequestError):
    """A row, a column or a source of data is not what the experiment says."""


class RecordError(RequestError):
    """A sweep, a trial or an adapter that was named is not there, or is not whole."""


class ClusterError(OrchestratorError):
    """Ray cannot be reached, or its nodes do not share the output folder. Exit code 1."""


class HubError(OrchestratorError):
    """The hub cannot be reached, or fails. Exit code 1."""


class ExportError(OrchestratorError):
    """An export was made, but does not answer as its source does, or cannot be asked. Exit code 1."""


class TrialError(OrchestratorError):
    """A trial failed while it ran, for a reason that running it again would meet again."""

    cause: ClassVar[FailureCause] = "configuration"


class DivergedError(TrialError):
    """A loss or a gradient of the trial is NaN or infinite."""

    cause = "diverged"


class TooLargeError(TrialError):
    """The trial does not fit into memory."""

    cause = "out_of_memory"


class SweepError(OrchestratorError):
    """A sweep ended without any finished trial. Exit code 1."""


class TrialsFailedError(OrchestratorError):
    """A sweep has a best adapter, but some of its trials failed. Exit code 3."""

    exit_code = 3


class Interrupted(OrchestratorError):
    """A sweep was interrupted by a signal: its results are kept, and it can go on.

    Exit code 128 + the signal's number: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """

    exit_code = 130

    def __init__(self, message: str, remedy: str = "", exit_code: int = exit_code) -> None:
        super().__init__(message, remedy)
        self.exit_code = exit_code


class StorageError(OrchestratorError):
    """The disk is full, read-only or fails: a sweep is interrupted by it, and can go on. Exit code 74 (EX_IOERR)."""

    exit_code = 74
