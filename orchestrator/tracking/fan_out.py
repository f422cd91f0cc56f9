"""All trackers of a trial behind one object. JSONL is the truth; the others may fail without stopping the trial."""

from collections.abc import Callable, Sequence

from orchestrator.record import OPEN, MetricPoint, TrialResult, read_metrics
from orchestrator.spec.sections import TrackingSection
from orchestrator.tracking.jsonl import JsonlTracker
from orchestrator.tracking.protocol import Tracker, TrialIdentity
from orchestrator.tracking.secrets import reason


class Trackers:
    """Sends each point to every tracker."""

    def __init__(self, jsonl: JsonlTracker, views: list[Tracker]) -> None:
        """
        Args:
            jsonl: the record itself; its faults are raised.
            views: trackers that have begun.
        """
        self._jsonl = jsonl
        self._views: list[Tracker] = []
        self.untracked: list[str] = []
        """Trackers that do not have all of the trial: those that failed, and until its end all of them."""
        self.warnings: list[str] = []
        for view in views:
            self.add(view)

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
            else:
                if result.state not in OPEN:
                    self.untracked.remove(view.name)
        self._views.clear()

    def add(self, view: Tracker) -> None:
        """Take in a view that has begun."""
        self._views.append(view)
        self.untracked.append(view.name)

    def add_failed(self, name: str, error: Exception) -> None:
        """Note a view that could not begin."""
        self.untracked.append(name)
        self._warn(name, error)

    def _drop(self, view: Tracker, error: Exception) -> None:
        self._views.remove(view)
        self._warn(view.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self.warnings.append(
            f"{_failed(name)} {reason(error)}; training goes on, and the rest is sent when it has ended"
        )


def open_trackers(identity: TrialIdentity) -> Trackers:
    """Start the trackers that the experiment asks for. One that cannot begin is a warning."""
    jsonl = JsonlTracker(identity.paths, identity.start.step)
    trackers = Trackers(jsonl, [])
    for name in wanted(identity.tracking):
        try:
            trackers.add(open_tracker(name, identity))
        except Exception as error:  # as in `Trackers.log`
            trackers.add_failed(name, error)
    return trackers


def open_tracker(name: str, identity: TrialIdentity) -> Tracker:
    """Start one tracker, and give it what it lacks of the points that are on disk."""
    view = _KINDS[name]()(identity)
    if points := read_metrics(identity.paths):
        view.replay(points)
    return view


def has_failed(name: str, warnings: Sequence[str]) -> bool:
    """Whether a trial's warnings tell of a failure of this tracker."""
    return any(warning.startswith(_failed(name)) for warning in warnings)


def _failed(name: str) -> str:
    """How the warning of a failure begins."""
    return f"{name} failed:"


def wanted(tracking: TrackingSection) -> list[str]:
    """Names of the trackers that the experiment asks for."""
    asked = {
        "TensorBoard": tracking.tensorboard,
        "W&B": tracking.wandb.mode != "disabled",
        "MLflow": tracking.mlflow,
        "trackio": tracking.trackio,
    }
    return [name for name, is_asked in asked.items() if is_asked]


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


_KINDS = {"TensorBoard": _tensorboard, "W&B": _wandb, "MLflow": _mlflow, "trackio": _trackio}
"""Imports of each tracker's library wait until it is wanted."""
