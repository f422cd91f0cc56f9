"""From a finished sweep to an adapter that serves: choose it, score it, ship it, ask it."""

from orchestrator.deploy.finished import ChosenTrial, FinishedSweep, open_sweep

__all__ = ["ChosenTrial", "FinishedSweep", "open_sweep"]
