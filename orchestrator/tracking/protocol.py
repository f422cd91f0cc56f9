"""What a tracker is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.record import MetricPoint, TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections import TrackingSection


@dataclass(frozen=True)
class TrialIdentity:
    """What a tracker needs to know of the trial it records."""

    paths: TrialPaths
    start: TrialResult
    """The trial so far: it goes on from `start.step`, which is 0 for a fresh one."""
    spec: SweepSpec
    """The sweep's experiment."""

    @property
    def config(self) -> TrialConfig:
        """The trial's configuration, for the steps that come now."""
        return self.start.config

    @property
    def tracking(self) -> TrackingSection:
        """The trackers that are wanted."""
        return self.spec.tracking

    @property
    def group(self) -> str:
        """Name of the sweep."""
        return self.paths.sweep.name


class Tracker(Protocol):
    """A sink for points. Its constructor and all methods may raise anything: that becomes a warning."""

    name: str

    def replay(self, points: Sequence[MetricPoint]) -> None:
        """Record those of these earlier points that the tracker does not have yet."""

    def log(self, point: MetricPoint) -> None:
        """Record one point."""

    def finish(self, result: TrialResult) -> None:
        """Record the outcome and close."""
