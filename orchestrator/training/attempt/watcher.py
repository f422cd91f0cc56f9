"""Whoever follows a trial and may end it."""

from typing import Protocol

from orchestrator.record import MetricPoint


class Watcher(Protocol):
    """Called from the training loop; what it returns decides whether the trial goes on."""

    def on_step(self, step: int, total_steps: int) -> bool:
        """Called after each optimizer step; False ends the trial."""

    def on_report(self, point: MetricPoint) -> bool:
        """Called after each evaluation, when all of it is on disk; False ends the trial."""

    def say(self, sentence: str) -> None:
        """Called with each warning once, and with what is done about it."""
