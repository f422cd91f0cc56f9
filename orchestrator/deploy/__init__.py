"""From a finished sweep to an adapter that serves: choose it, score it, ship it, ask it."""

from orchestrator.deploy.finished import Best, Sweep, open_sweep

__all__ = ["Best", "Sweep", "open_sweep"]
