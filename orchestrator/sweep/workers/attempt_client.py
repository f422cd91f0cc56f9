"""One attempt at a trial that some worker trains: its books are kept here, one evaluation at a time."""

import shutil
import threading
import time
import uuid
from collections import deque

from orchestrator.errors import StorageError, TrialError
from orchestrator.record import MetricPoint, SweepPaths, TrialPaths, TrialResult, end_trial, read_result
from orchestrator.spec import SweepSpec
from orchestrator.sweep.workers.worker_client import AttemptLost, Workers, claim, is_claimed
from orchestrator.training.attempt.events import END, Completed, Evaluated, Event, Failed, Left, Logged, Noted, Saved
from orchestrator.training.attempt.recorder import TrialRecorder

_LOOK_S = 0.5
_RENEW_S = 5.0  # the host gives a lease up after 30 s


class Claim:
    """An attempt's right to a trial's folder, until another attempt claims it."""

    def __init__(self, paths: TrialPaths, workers: Workers) -> None:
        """Take it, and wait until no worker trains the trial for an earlier attempt."""
        self.name = uuid.uuid4().hex
        self._paths = paths
        before = claim(paths, self.name)
        if before is not None:
            workers.evict(before)

    @property
    def holds(self) -> bool:
        """Whether no other attempt has claimed the trial since."""
        return is_claimed(self._paths, self.name)

    def end(self) -> None:
        """Give it up."""
        if self.holds:
            self._paths.lease.unlink()


class RemoteTrial:
    """Enters what the worker tells, up to the evaluation that was asked for: what came after it waits outside.

    So the record of a trial that is stopped ends at the evaluation by which it was stopped, though its worker, which
    waits for nobody, has gone on.
    """

    def __init__(self, start: TrialResult, paths: TrialPaths, spec: SweepSpec, workers: Workers, claim: Claim) -> None:
        """Wait for a slot, and begin there.

        Args:
            start: the trial so far, as at the checkpoint that it goes on from; `start.config` is what to train.
            paths: where it writes.
            spec: the experiment.
            workers: have the slots.
            claim: the right to the trial's folder.
        """
        self._paths = paths
        self._claim = claim
        self._inbox: deque[Event] = deque()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._lease = workers.acquire(claim.name, start, paths)
        with self._lock:
            threading.Thread(target=self._attend, name="attend", daemon=True).start()
            try:
                self._books = TrialRecorder(start, paths, spec)
            except BaseException:  # such as a disk that is full
                self._over.set()
                self._lease.release()
                raise

    def next(self) -> MetricPoint | TrialResult:
        """Go on to the next evaluation, or to the end, with which the last evaluation comes.

        Raises:
            TrialError: the trial has failed; its result is on disk.
            AttemptLost: a fault from outside.
        """
        with self._lock:
            while True:
                event = self._next_event()
                if isinstance(event, Left):
                    self._leave()
                    if event.is_storage:
                        raise StorageError(str(event.lost))
                    raise AttemptLost(event.lost or "it was stopped: by another attempt, or with the whole sweep")
                if isinstance(event, Noted) and "applied" in event.fields:  # told after its first step
                    SweepPaths(self._paths.sweep).first_step.touch()
                point = self._books.record(event)
                result = self._books.result
                if isinstance(event, Completed):
                    self._end()
                    return result
                if isinstance(event, Failed):
                    self._end()
                    raise TrialError(event.error, event.remedy)
                if point is not None and point.step != result.total_steps:
                    return point

    def stop(self) -> None:
        """Give the slot back, and close the books. Nothing if it is over."""
        with self._lock:
            if self._over.is_set():
                return
            untold = list(self._inbox)
            if not untold or not isinstance(untold[-1], END):  # else it has given its slot back by itself
                untold += self._lease.release()
            try:
                if self._claim.holds:
                    if self._paths.result.is_file():
                        self._settle(untold)
                    elif not self._paths.paused.is_file() and self._lease.is_interrupted():
                        self._keep(untold)
            finally:  # also on a full disk
                self._leave()

    def _attend(self) -> None:
        """Between questions: keep the slot, or give it back when the driver has put the result down, or has it wait.

        Tune may keep this process, when it has stopped or paused its trial, until there is another for it.
        """
        renewed = time.monotonic()
        while not self._over.wait(_LOOK_S):
            if self._paths.result.is_file() or self._paths.paused.is_file():
                self.stop()
            elif time.monotonic() > renewed + _RENEW_S:
                self._lease.renew()
                renewed = time.monotonic()

    def _next_event(self) -> Event:
        try:
            while not self._inbox:
                self._inbox.extend(self._lease.events())
        except AttemptLost:
            self._lease.release()  # a worker that was out of reach for a moment trains on
            self._leave()
            raise
        return self._inbox.popleft()

    def _leave(self) -> None:
        """Close the books, unless they are another attempt's by now."""
        try:
            if self._claim.holds:
                self._books.close()
        finally:  # also on a full disk
            self._end()

    def _end(self) -> None:
        self._over.set()
        self._claim.end()

    def _keep(self, untold: list[Event]) -> None:
        """Enter what the worker has done up to the checkpoint that it has written as the sweep was interrupted.

        The scheduler hears of these evaluations when the sweep goes on.
        """
        for event in untold:
            if not isinstance(event, Left):
                self._books.record(event)

    def _settle(self, untold: list[Event]) -> None:
        """What the worker has made past the end of a stopped trial: count its steps, and take its files away."""
        result = read_result(self._paths)
        steps = [event.step for event in untold if isinstance(event, Logged | Evaluated | Saved | Left)]
        end_trial(
            self._paths, result.model_copy(update={"extra_steps": max([0, *(step - result.step for step in steps)])})
        )
        for folder in self._paths.root.glob("adapters/step-*"):
            if result.best is None or folder != self._paths.root / result.best.adapter:
                shutil.rmtree(folder)
