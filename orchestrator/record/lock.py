"""Allow one driver for each sweep: a second one would write into the same trials."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import RequestError
from orchestrator.record.paths import SweepPaths


@contextmanager
def only_driver(paths: SweepPaths) -> Iterator[None]:
    """Hold the sweep for this process. The lock ends with the process, however it ends.

    Raises:
        RequestError: another process holds the sweep, or its folder cannot be written to.
    """
    try:
        file = (paths.root / ".driver.lock").open("w")
    except OSError as error:
        raise RequestError(
            f"{paths.root}: cannot be written: {error.strerror}",
            "A sweep that continues writes into its folder: make it writable, or copy it and resume the copy.",
        ) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{paths.root}: another process is running this sweep",
                f"`orchestrator status {paths.root}` shows how far it is.",
            ) from None
        yield
