"""Threads that write the files of trials in the background, while the trials continue."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.training.attempt.events import Left, fault_fields
from orchestrator.training.attempt.log_file import log_traceback
from orchestrator.training.worker.slots import SlotLease

MAX_JOBS = 64
"""Most jobs of a trial that may be pending. When there are more, training waits."""


class FileWriter:
    """A `WriteQueue` with a thread of its own, for one attempt at a trial."""

    def __init__(self, lease: SlotLease, earlier: threading.Thread | None = None) -> None:
        """Start the thread.

        Args:
            lease: receives the event of a fault.
            earlier: the thread of an earlier attempt at the trial, whose files are written first.
        """
        self._lease = lease
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_JOBS)
        self.thread = threading.Thread(target=self._run, args=(earlier,), name="writer", daemon=True)
        self.thread.start()

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job; see `WriteQueue`."""
        self._jobs.put(job)

    def wait(self) -> None:
        """Block until all jobs are done; see `WriteQueue`."""
        self._jobs.join()

    def close(self) -> None:
        """End the thread after the pending jobs. No job may be queued after this."""
        self._jobs.put(None)

    def _run(self, earlier: threading.Thread | None) -> None:
        if earlier is not None:
            earlier.join()
        del earlier
        lease = self._lease
        while (job := self._jobs.get()) is not None:
            try:
                if not lease.has_ended and lease.is_replaced():
                    self._leave(lost="another attempt has claimed the trial")
                elif not lease.has_ended:
                    job()
            except Exception as error:  # a fault of the disk; another attempt can continue from what is written
                log_traceback()
                self._leave(**fault_fields(error))
            finally:
                self._jobs.task_done()
                del job  # while the thread waits for the next job, nothing of this one may stay in memory

    def _leave(self, **fields: Any) -> None:
        self._lease.emit(Left(0.0, self._lease.gpu_seconds, 0.0, 0, **fields))
        self._lease.release()


class FileWriters:
    """Opens the writers of a process. If two attempts at a trial overlap, the earlier one's files are written first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[Path, threading.Thread] = {}

    def open(self, lease: SlotLease) -> FileWriter:
        """Open a writer for one attempt."""
        with self._lock:
            writer = FileWriter(lease, self._last.get(lease.paths.root))
            self._last[lease.paths.root] = writer.thread
        return writer
