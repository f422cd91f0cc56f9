"""What a worker answers to the supervisor, and the process that it names."""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class ProcessId:
    """A process, told from a later one that has the same number."""

    host: str
    pid: int
    created: float
    """Time of its start, as the system counts it."""

    @classmethod
    def own(cls) -> "ProcessId":
        """Return the process that calls this."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def end(self) -> bool:
        """End the process at once, if it still runs; call this on its machine. Return whether it ran."""
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if psutil.Process(self.pid).create_time() == self.created:
                os.kill(self.pid, signal.SIGKILL)
                return True
        return False

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


@dataclass(frozen=True)
class Pulse:
    """The state of a worker at one moment."""

    process: ProcessId
    is_open: bool
    """Whether it has loaded the base, or has no need to before its first trial."""
    is_busy: bool
    """Whether it loads the base or a trial has not ended."""
    idle_s: float
    """Seconds since its last sign of progress."""
    longest_s: float
    """Longest pause between two signs of progress so far, in seconds."""
    has_stepped: bool
    """Whether a step has been made."""
    has_evaluated: bool
    """Whether an evaluation has been done."""
    is_retired: bool = False
    """Whether its trials have been asked to go on elsewhere, because its process or its node ends soon."""
