"""The only code that knows Ray Tune: space, searchers, schedulers, relays, workers, restore."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.sweep.run import resume_sweep, run_sweep

__all__ = ["resume_sweep", "run_sweep"]


def __getattr__(name: str) -> Any:
    """What drives a sweep, at first use: a relay imports this package too, and is to be there soon."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator.sweep import run

    return getattr(run, name)
