"""What a tracker is."""

from dataclasses import dataclass
from typing import Protocol

from orchestrator.record import MetricPoint, TrialPaths, TrialResult
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import TrackingSection


@dataclass(frozen=True)
class TrialIdentity:
    """What a tracker needs to know of the trial it records."""

    paths: TrialPaths
    config: TrialConfig
    tracking: TrackingSection
    metric: str
    resumed_step: int
    """Step the trial goes on from; 0 for a fresh one."""

    @property
    def group(self) -> str:
        """Name of the sweep."""
        return self.paths.sweep.name


class Tracker(Protocol):
    """A sink for points. Of a fresh trial, its constructor may fail loudly; all later failures become warnings."""

    name: str

    def log(self, point: MetricPoint) -> None:
        """Record one point."""

    def finish(self, result: TrialResult) -> None:
        """Record the outcome and close."""
