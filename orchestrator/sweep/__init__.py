"""Sweeps under Ray Tune: which trials there are, which of them are stopped, and where they train.

Only this package and `orchestrator.cluster` use Ray. Reading order, from the top:

- `run`: runs or resumes a sweep; builds the tuner from the parts below.
- `results`: writes the results that only the driver can know; `interruption`: ends a sweep after a signal.
- `repeats`, `audit`: trials that run again, as small sweeps inside the sweep (`reruns`).
- `workers/`: the processes that train, and the clients that talk to them.
- `schedulers/`: which trials are stopped, paused or cloned.
- `search/`: which points of the search space are tried.
- `turns`, `tune_trial`, `snapshot`, `follow`, `rng`: small modules that the others share.

Processes and threads:

1. The driver is the process that calls `run_sweep`. In its main thread Tune's loop runs, and with it the searcher, the
   scheduler (`Conductor`) and the callbacks (`ResultKeeper`). Thread `follow` reads the records for the progress
   display; thread `placement` reports what a sweep waits for on a busy cluster.
2. Each running trial has a light actor, a `TrialTrainable`, which Tune asks for one evaluation at a time. Its thread
   `attend` keeps the slot of the trial on a worker. It writes the records of the trial, and imports no ML library.
3. Each GPU has one `Worker` actor, which holds the base model and trains several trials at a time. Its threads are
   those of `orchestrator.training.worker.runtime`, and one for each call that waits for events.

Heavy libraries (Tune, torch) are imported inside functions, so that processes start in parallel with their imports.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.sweep.run import finish_audit, resume_sweep, run_sweep

__all__ = ["finish_audit", "resume_sweep", "run_sweep"]


def __getattr__(name: str) -> Any:
    """Import the driver's code at first use: trainables import this package too, and must start quickly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator.sweep import run

    return getattr(run, name)
