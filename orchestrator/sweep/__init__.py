"""The only code that knows Ray Tune: space, searchers, schedulers, trainable, restore."""

from orchestrator.sweep.run import resume_sweep, run_sweep

__all__ = ["resume_sweep", "run_sweep"]
