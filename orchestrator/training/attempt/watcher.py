"""The interface of whoever follows a local trial and may end it."""

from typing import Protocol

from orchestrator.record import MetricPoint


class Watcher(Protocol):
    """Receives the progress of a trial. Its return values decide whether the trial continues."""

    def on_step(self, step: int, total_steps: int) -> bool:
        """Handle the end of an optimizer step; return False to end the trial."""

    def on_report(self, point: MetricPoint) -> bool:
        """Handle an evaluation, once all of it is on disk; return False to end the trial."""

    def say(self, sentence: str) -> None:
        """Receive a warning, once each, or what is done about it."""
