"""The interface through which a trial has its files written and its events reported, in order."""

from collections.abc import Callable
from typing import Protocol


class WriteQueue(Protocol):
    """Runs jobs in the order in which they come, at once or in the background while training continues.

    A job writes files or emits the event that reports them.
    """

    def do(self, job: Callable[[], None]) -> None:
        """Run a job, now or later."""

    def wait(self) -> None:
        """Block until all jobs are done."""


class WriteNow:
    """A `WriteQueue` that runs each job at once, in the calling thread."""

    def do(self, job: Callable[[], None]) -> None:
        """Run the job now."""
        job()

    def wait(self) -> None:
        """Return at once: no job is ever pending."""
