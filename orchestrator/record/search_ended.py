"""The record of a sweep that has ended itself."""

from typing import Literal

from orchestrator.record.models import Record


class SearchEnded(Record):
    """The rule of search.stop that was met first, with what it has seen."""

    rule: Literal["gain", "unmoved"]
    """Name of the rule."""
    num_ended: int
    """Trials that had ended by then, without those that machines have lost."""
    leader: str
    """Trial with the best value by then."""
    metric: str
    best: float
    """The leader's value of the metric."""
    share: float | None = None
    """Rule gain: the least gain, as a share of the best value."""
    expected_gain: float | None = None
    """Rule gain: what another trial was expected to gain, in the metric's unit."""
    tokens: int | None = None
    """Rule gain: tokens of a trial, the mean of those that had ended."""
    unmoved: int | None = None
    """Rule unmoved: trials that had ended without a new leader."""

    def __str__(self) -> str:
        best = f"{self.metric} {self.best:.4g} ({self.leader})"
        if self.rule == "gain":
            assert self.expected_gain is not None
            assert self.share is not None
            return (
                f"the sweep ends itself after {self.num_ended} trials: another {self.tokens:,} tokens are expected to "
                f"gain {self.expected_gain:.2g}, {self.expected_gain / abs(self.best):.2%} of the best, less than "
                f"{self.share:.2%}; the best is {best}"
            )
        return (
            f"the sweep ends itself after {self.num_ended} trials: none of the last {self.unmoved} has beaten the best "
            f"before them by more than the held-out rows can tell; the best is {best}"
        )
