"""A trial in a thread of its own, one evaluation at a time: what turns a training loop into Tune's `step`."""

import queue
import threading
from collections.abc import Callable

from orchestrator.record import MetricPoint, TrialResult
from orchestrator.training.watcher import Watcher


class TrialSession:
    """Runs a trial and waits at each evaluation until it is told to go on or to stop.

    A function trainable cannot do this: Tune ends its process without waiting for it, so that what must happen on a
    stop may not (ray 2.60).
    """

    def __init__(self, run: Callable[[Watcher], TrialResult | None]) -> None:
        """`run` is called in the thread, with this object as its watcher."""
        self._events: queue.Queue[MetricPoint | TrialResult | BaseException | None] = queue.Queue()
        self._go_on = threading.Semaphore(0)
        self._waiting = False
        self._stopping = False
        self._total_steps: int | None = None
        self._thread = threading.Thread(target=self._run, args=(run,), name="trial", daemon=True)
        self._thread.start()

    def next(self) -> MetricPoint | TrialResult:
        """Let the trial go on to its next evaluation, or to its end.

        Returns:
            The evaluation's point; or the result, in which the last evaluation is contained.

        Raises:
            Whatever the trial raised.
        """
        if self._waiting:
            self._waiting = False
            self._go_on.release()
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        if event is None:
            raise RuntimeError("the trial was stopped and has no next evaluation")
        self._waiting = isinstance(event, MetricPoint)
        return event

    def stop(self) -> None:
        """End the trial at its next step and wait until all it holds is given back."""
        self._stopping = True
        self._go_on.release()
        self._thread.join()

    def on_step(self, step: int, total_steps: int) -> bool:
        """See `Watcher`."""
        self._total_steps = total_steps
        return not self._stopping

    def on_report(self, point: MetricPoint) -> bool:
        """See `Watcher`. The last step's evaluation comes with the result: a trial that is done cannot be stopped."""
        if point.step != self._total_steps and not self._stopping:
            self._events.put(point)
            self._go_on.acquire()
        return not self._stopping

    def _run(self, run: Callable[[Watcher], TrialResult | None]) -> None:
        try:
            self._events.put(run(self))
        except BaseException as error:  # handed to `next`, which raises it in Tune's thread
            self._events.put(error)
