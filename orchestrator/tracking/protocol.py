"""The interface of trackers, and which points a resumed trial replays."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.record import MetricPoint, TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections import TrackingSection


@dataclass(frozen=True)
class TrialIdentity:
    """Describes the trial that a tracker records."""

    paths: TrialPaths
    start: TrialResult
    """The trial so far. It continues after `start.step`, which is 0 for a new trial."""
    spec: SweepSpec
    """The sweep's experiment."""

    @property
    def config(self) -> TrialConfig:
        """The trial's configuration for the next steps."""
        return self.start.config

    @property
    def tracking(self) -> TrackingSection:
        """The experiment's tracking section."""
        return self.spec.tracking

    @property
    def group(self) -> str:
        """The name of the sweep."""
        return self.paths.sweep.name


class Tracker(Protocol):
    """Records the points of one trial. The constructor and all methods may raise; an error becomes a warning."""

    name: str

    def replay(self, points: Sequence[MetricPoint]) -> None:
        """Record the earlier points that the tracker does not have yet."""

    def log(self, point: MetricPoint) -> None:
        """Record one point."""

    def finish(self, result: TrialResult) -> None:
        """Record the outcome and close."""


def missing_points(points: Sequence[MetricPoint], known_steps: Iterable[int]) -> list[MetricPoint]:
    """Return the points that a tracker does not have yet.

    Args:
        points: all points of the trial. A step may come twice, because a resumed trial goes back to its checkpoint.
        known_steps: the step of each point that the tracker has.
    """
    known, missing = Counter(known_steps), []
    for point in points:
        if known[point.step]:
            known[point.step] -= 1
        else:
            missing.append(point)
    return missing
