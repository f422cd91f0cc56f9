"""Allow one driver for each sweep: a second one would write into the same trials."""

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from orchestrator.errors import RequestError
from orchestrator.record.paths import SweepPaths


@contextmanager
def only_driver(paths: SweepPaths) -> Iterator[None]:
    """Hold the sweep for this process. The lock ends with the process, however it ends.

    Raises:
        RequestError: another process holds the sweep, or its folder cannot be written to.
    """
    lock = FileLock(paths.root / ".driver.lock", fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RequestError(
            f"{paths.root}: another process is running this sweep",
            f"`orchestrator status {paths.root}` shows how far it is.",
        ) from None
    except OSError as error:
        raise RequestError(
            f"{paths.root}: cannot be written: {error.strerror}",
            "A sweep that continues writes into its folder: make it writable, or copy it and resume the copy.",
        ) from error
    try:
        yield
    finally:
        lock.release()
