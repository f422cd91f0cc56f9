"""All trackers of a trial behind one object. JSONL is the truth; the others may fail without stopping the trial."""

from collections.abc import Callable, Iterator

from orchestrator.record import MetricPoint, TrialResult
from orchestrator.spec.sections import TrackingSection
from orchestrator.tracking.jsonl import JsonlTracker
from orchestrator.tracking.protocol import Tracker, TrialIdentity


class Trackers:
    """Sends each point to every tracker."""

    def __init__(self, jsonl: JsonlTracker, views: list[Tracker]) -> None:
        self._jsonl = jsonl
        self._views = views
        self.warnings: list[str] = []

    def log(self, point: MetricPoint) -> None:
        """Record one point. A view that fails is dropped with a warning; JSONL's own fault is raised."""
        self._jsonl.log(point)
        for view in list(self._views):
            try:
                view.log(point)
            except Exception as error:  # whatever a third-party tracker raises: it must never stop a trial
                self._drop(view, error)

    def finish(self, result: TrialResult) -> None:
        """Close every tracker."""
        for view in list(self._views):
            try:
                view.finish(result)
            except Exception as error:  # as in `log`
                self._drop(view, error)
        self._views.clear()

    def _drop(self, view: Tracker, error: Exception) -> None:
        self._views.remove(view)
        self.warn(view.name, error)

    def warn(self, view: str, error: Exception) -> None:
        """Keep a warning for the trial's record."""
        self.warnings.append(f"{view} failed and records no more of this trial: {type(error).__name__}: {error}")


def open_trackers(identity: TrialIdentity) -> Trackers:
    """Start the trackers that the experiment asks for.

    A failure to start is raised for a fresh trial, for then it is a wrong setting; a trial that goes on only warns.
    """
    jsonl = JsonlTracker(identity.paths, identity.resumed_step)
    views: list[Tracker] = []
    trackers = Trackers(jsonl, views)
    for name, start in _wanted(identity.tracking):
        try:
            views.append(start(identity))
        except Exception as error:  # as in `log`
            if identity.resumed_step == 0:
                raise
            trackers.warn(name, error)
    return trackers


def _wanted(tracking: TrackingSection) -> Iterator[tuple[str, Callable[[TrialIdentity], Tracker]]]:
    if tracking.tensorboard:
        from orchestrator.tracking.tensorboard import TensorBoardTracker

        yield TensorBoardTracker.name, TensorBoardTracker
    if tracking.wandb.mode != "disabled":
        from orchestrator.tracking.wandb import WandbTracker

        yield WandbTracker.name, WandbTracker
    if tracking.mlflow:
        from orchestrator.tracking.mlflow import MlflowTracker

        yield MlflowTracker.name, MlflowTracker
    if tracking.trackio:
        from orchestrator.tracking.trackio import TrackioTracker

        yield TrackioTracker.name, TrackioTracker
