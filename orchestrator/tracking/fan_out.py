"""All trackers of a trial behind one object.

JSONL is the authoritative record. The other trackers ("views") may fail without stopping the trial.
"""

from collections.abc import Callable, Sequence

from orchestrator.record import OPEN, MetricPoint, TrialResult, read_metrics
from orchestrator.spec.sections import TrackingSection
from orchestrator.tracking.jsonl import JsonlTracker
from orchestrator.tracking.protocol import Tracker, TrialIdentity
from orchestrator.tracking.secrets import reason


class Trackers:
    """Sends each point to every tracker."""

    def __init__(self, jsonl: JsonlTracker, views: list[Tracker]) -> None:
        """Combine trackers.

        Args:
            jsonl: the authoritative record; its errors are raised.
            views: trackers that have been opened.
        """
        self._jsonl = jsonl
        self._views: list[Tracker] = []
        self.untracked: list[str] = []
        """Names of trackers without a complete record: those that failed and, until the trial ends, all of them."""
        self.warnings: list[str] = []
        for view in views:
            self.add(view)

    def log(self, point: MetricPoint) -> None:
        """Record one point. A view that fails is dropped with a warning; an error of JSONL is raised."""
        self._jsonl.log(point)
        for view in list(self._views):
            try:
                view.log(point)
            except Exception as error:  # a third-party tracker may raise anything, and must never stop a trial
                self._drop(view, error)

    def finish(self, result: TrialResult) -> None:
        """Close every tracker."""
        for view in list(self._views):
            try:
                view.finish(result)
            except Exception as error:  # as in `log`
                self._drop(view, error)
            else:
                if result.state not in OPEN:
                    self.untracked.remove(view.name)
        self._views.clear()

    def add(self, view: Tracker) -> None:
        """Add a view that has been opened."""
        self._views.append(view)
        self.untracked.append(view.name)

    def add_failed(self, name: str, error: Exception) -> None:
        """Record a warning for a view that could not be opened."""
        self.untracked.append(name)
        self._warn(name, error)

    def _drop(self, view: Tracker, error: Exception) -> None:
        self._views.remove(view)
        self._warn(view.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self.warnings.append(
            f"{_failed(name)} {reason(error)}; training continues, and missing records are sent after it ends"
        )


def open_trackers(identity: TrialIdentity) -> Trackers:
    """Open the trackers that the experiment requests. A tracker that cannot be opened becomes a warning."""
    jsonl = JsonlTracker(identity.paths, identity.start.step)
    trackers = Trackers(jsonl, [])
    for name in wanted(identity.tracking):
        try:
            trackers.add(open_tracker(name, identity))
        except Exception as error:  # as in `Trackers.log`
            trackers.add_failed(name, error)
    return trackers


def open_tracker(name: str, identity: TrialIdentity) -> Tracker:
    """Open one tracker, and send it the points on disk that it does not have yet."""
    view = _TRACKERS[name]()(identity)
    if points := read_metrics(identity.paths):
        view.replay(points)
    return view


def has_failed(name: str, warnings: Sequence[str]) -> bool:
    """Return whether a trial's warnings report a failure of this tracker."""
    return any(warning.startswith(_failed(name)) for warning in warnings)


def _failed(name: str) -> str:
    """Return the beginning of a failure's warning."""
    return f"{name} failed:"


def wanted(tracking: TrackingSection) -> list[str]:
    """Return the names of the trackers that the experiment requests."""
    requested = {
        "TensorBoard": tracking.tensorboard,
        "W&B": tracking.wandb.mode != "disabled",
        "MLflow": tracking.mlflow,
        "trackio": tracking.trackio,
    }
    return [name for name, is_requested in requested.items() if is_requested]


def _tensorboard() -> Callable[[TrialIdentity], Tracker]:
    from orchestrator.tracking.tensorboard import TensorBoardTracker

    return TensorBoardTracker


def _wandb() -> Callable[[TrialIdentity], Tracker]:
    from orchestrator.tracking.wandb import WandbTracker

    return WandbTracker


def _mlflow() -> Callable[[TrialIdentity], Tracker]:
    from orchestrator.tracking.mlflow import MlflowTracker

    return MlflowTracker


def _trackio() -> Callable[[TrialIdentity], Tracker]:
    from orchestrator.tracking.trackio import TrackioTracker

    return TrackioTracker


_TRACKERS = {"TensorBoard": _tensorboard, "W&B": _wandb, "MLflow": _mlflow, "trackio": _trackio}
"""Name -> function that imports the tracker's library, only when it is requested, and returns the tracker's class."""
