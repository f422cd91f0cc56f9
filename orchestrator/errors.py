"""All errors that the project raises on purpose. Each says what is wrong and what to do about it.

Exit codes of the commands:

- 0: done
- 1: failed while running
- 2: the request is wrong; nothing was started
- 3: the sweep has a best adapter, but some of its trials failed
- 69: Ray itself has died on this machine; `resume` continues
- 74, 129, 130, 138, 143: interrupted by a full or failing disk, SIGHUP, Ctrl-C, SIGUSR1 or SIGTERM; `resume` continues
"""

from typing import ClassVar, Literal

FailureCause = Literal["diverged", "out_of_memory", "configuration", "infrastructure"]
"""Why a trial failed. All causes except `infrastructure` lie in the trial's own values, which would fail again."""


class OrchestratorError(Exception):
    """Base class of the project's errors. Instances can be pickled, so they pass from process to process unchanged.

    Attributes:
        message: what is wrong.
        remedy: what to do about it; empty if there is nothing to say.
    """

    exit_code = 1
    cause: ClassVar[FailureCause] = "infrastructure"
    """The cause that a trial's record names when this error ends the trial."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class RequestError(OrchestratorError):
    """The request is wrong. Nothing has been started or written. Exit code 2."""

    exit_code = 2


class SpecError(RequestError):
    """An experiment file or an override does not describe a valid sweep."""


class DataError(RequestError):
    """A row, a column or a data source does not match the experiment."""


class RecordError(RequestError):
    """A requested sweep, trial or adapter does not exist or is incomplete."""


class ClusterError(OrchestratorError):
    """Ray cannot be reached, or the nodes do not share the output folder. Exit code 1."""


class HubError(OrchestratorError):
    """The Hugging Face Hub cannot be reached or answers with an error. Exit code 1."""


class ExportError(OrchestratorError):
    """An export was written, but its outputs differ from those of its source or cannot be computed. Exit code 1."""


class TrialError(OrchestratorError):
    """A trial failed while it ran, and would fail in the same way if it ran again."""

    cause: ClassVar[FailureCause] = "configuration"


class DivergedError(TrialError):
    """A loss or a gradient of the trial is NaN or infinite."""

    cause = "diverged"


class TooLargeError(TrialError):
    """The trial does not fit into memory."""

    cause = "out_of_memory"


class MetricError(OrchestratorError):
    """A user's own metric cannot be computed. The values of the trial are not the cause."""


class SweepError(OrchestratorError):
    """A sweep ended without a finished trial. Exit code 1."""


class TrialsFailedError(OrchestratorError):
    """A sweep has a best adapter, but some of its trials failed. Exit code 3."""

    exit_code = 3


class Interrupted(OrchestratorError):
    """A signal interrupted a sweep. Its results are kept, and it can be resumed.

    The exit code is 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 138 for SIGUSR1.
    """

    exit_code = 130

    def __init__(self, message: str, remedy: str = "", exit_code: int = exit_code) -> None:
        super().__init__(message, remedy)
        self.exit_code = exit_code


class StorageError(OrchestratorError):
    """The disk is full, read-only or failing. The sweep is interrupted and can be resumed. Exit code 74 (EX_IOERR)."""

    exit_code = 74


class RayLostError(OrchestratorError):
    """Ray's own processes have died under a running sweep, which can be resumed. Exit code 69 (EX_UNAVAILABLE)."""

    exit_code = 69
