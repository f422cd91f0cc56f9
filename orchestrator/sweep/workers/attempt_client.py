"""Client of one attempt at a trial that a worker trains. It writes the records, one evaluation at a time.

Runs in the trainable of the trial.
"""

import shutil
import threading
import time
import uuid
from collections import deque

from orchestrator.errors import StorageError, TrialError
from orchestrator.record import MetricPoint, SweepPaths, TrialPaths, TrialResult, end_trial, read_result
from orchestrator.spec import SweepSpec
from orchestrator.sweep.workers.losses import AttemptLost, OutOfMemory
from orchestrator.sweep.workers.worker_client import Workers, claim, is_claimed
from orchestrator.training.attempt.events import END, Completed, Evaluated, Event, Failed, Left, Logged, Noted, Saved
from orchestrator.training.attempt.recorder import TrialRecorder

_CHECK_S = 0.5
"""Period at which thread `attend` looks at the trial's files."""
_RENEW_S = 5.0
"""Period at which a lease is renewed; a worker gives an unused lease up after 30 s."""


class Claim:
    """The right of an attempt to write into a trial's folder, until another attempt claims it."""

    def __init__(self, paths: TrialPaths, workers: Workers) -> None:
        """Claim the folder, and wait until no worker trains the trial for an earlier attempt."""
        self.name = uuid.uuid4().hex
        self._paths = paths
        before = claim(paths, self.name)
        if before is not None:
            workers.evict(before)

    @property
    def holds(self) -> bool:
        """Whether no other attempt has claimed the trial since then."""
        return is_claimed(self._paths, self.name)

    def end(self) -> None:
        """Give the right up."""
        if self.holds:
            self._paths.lease.unlink()


class RemoteTrial:
    """Records a worker's events up to the evaluation that was asked for; later events wait in an inbox.

    So the record of a stopped trial ends at the evaluation by which it was stopped, although its worker, which does not
    wait, has trained further.
    """

    def __init__(self, start: TrialResult, paths: TrialPaths, spec: SweepSpec, workers: Workers, claim: Claim) -> None:
        """Wait for a slot, and start to train there.

        Args:
            start: the trial at the checkpoint that it continues from; `start.config` is the configuration to train.
            paths: the trial's paths.
            spec: the experiment.
            workers: the workers of the sweep.
            claim: the right to write into the trial's folder.
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
                self._recorder = TrialRecorder(start, paths, spec)
            except BaseException:  # for example, the disk is full
                self._over.set()
                self._lease.release()
                raise

    def next(self) -> MetricPoint | TrialResult:
        """Wait for the next evaluation, or for the end of the trial, which comes with the last evaluation.

        Returns:
            The evaluation, or the result of the trial.

        Raises:
            TrialError: the trial has failed; its result is on disk.
            StorageError: the worker's disk is full or fails.
            OutOfMemory: the trial has run out of GPU memory; the next attempt takes less.
            AttemptLost: the attempt has ended by a fault outside the trial.
        """
        with self._lock:
            while True:
                event = self._next_event()
                if isinstance(event, Left):
                    self._close()
                    if event.is_storage:
                        raise StorageError(str(event.lost))
                    lost = event.lost or "it was stopped: by another attempt, or with the whole sweep"
                    if event.is_memory:
                        raise OutOfMemory(lost)
                    raise AttemptLost(lost, counts=event.lost is not None and not event.is_outside)
                if isinstance(event, Noted) and "applied" in event.fields:  # sent after the first step
                    SweepPaths(self._paths.sweep).first_step.touch()
                point = self._recorder.record(event)
                result = self._recorder.result
                if isinstance(event, Completed):
                    self._end()
                    return result
                if isinstance(event, Failed):
                    self._end()
                    raise TrialError(event.error, event.remedy)
                if point is not None and point.step != result.total_steps:
                    return point

    def stop(self) -> None:
        """Give the slot back and close the records. Do nothing if the attempt is over."""
        with self._lock:
            if self._over.is_set():
                return
            unread = list(self._inbox)
            if not unread or not isinstance(unread[-1], END):  # otherwise the worker has freed the slot by itself
                unread += self._lease.release()
            try:
                if self._claim.holds:
                    if self._paths.result.is_file():
                        self._discard(unread)
                    elif not self._paths.paused.is_file() and self._lease.is_interrupted():
                        self._record(unread)
            finally:  # even if the disk is full
                self._close()

    def _attend(self) -> None:
        """Keep the slot between Tune's calls; give it back once the driver has written the result or a pause.

        After a stop or a pause Tune may keep this process without a call, until it has another trial for it.
        """
        renewed = time.monotonic()
        while not self._over.wait(_CHECK_S):
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
            self._lease.release()  # a worker that was unreachable for a moment may still train
            self._close()
            raise
        return self._inbox.popleft()

    def _close(self) -> None:
        """Close the records, unless another attempt has claimed them."""
        try:
            if self._claim.holds:
                self._recorder.close()
        finally:  # even if the disk is full
            self._end()

    def _end(self) -> None:
        self._over.set()
        self._claim.end()

    def _record(self, unread: list[Event]) -> None:
        """Record what the worker has done up to the checkpoint that it wrote when the sweep was interrupted.

        These evaluations are reported to the scheduler after a resume.
        """
        for event in unread:
            if not isinstance(event, Left):
                self._recorder.record(event)

    def _discard(self, unread: list[Event]) -> None:
        """Count the steps that the worker has made past the end of a stopped trial, and delete their files."""
        result = read_result(self._paths)
        steps = [event.step for event in unread if isinstance(event, Logged | Evaluated | Saved | Left)]
        end_trial(
            self._paths, result.model_copy(update={"extra_steps": max([0, *(step - result.step for step in steps)])})
        )
        for folder in self._paths.root.glob("adapters/step-*"):
            if result.best is None or folder != self._paths.root / result.best.adapter:
                shutil.rmtree(folder)
