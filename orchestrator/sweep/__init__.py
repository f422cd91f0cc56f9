"""The only code that knows Ray Tune: space, searchers, schedulers, trainable, restore."""

from orchestrator.sweep.run import Interrupted, resume_sweep, run_sweep

__all__ = ["Interrupted", "resume_sweep", "run_sweep"]
