"""Make Tune's tuner of a sweep from the project's own search, scheduler and callbacks, or restore the one before.

Ray Tune takes seconds to import. It is imported inside functions, after the workers have been started.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from orchestrator.errors import OrchestratorError, RecordError
from orchestrator.record import SweepRecord
from orchestrator.signals import StopRequest
from orchestrator.spec import TrialConfig
from orchestrator.sweep.snapshot import has_trials, restore_snapshot
from orchestrator.sweep.workers.fleet import TRAINABLE_CPUS
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.upstream import TUNE_SETTINGS, keep_signal_handlers, pass_on_no_keys, replace_parts

Say = Callable[[str], None]
"""Takes a message for the user who has started the sweep."""

UnfitReason = Callable[[TrialConfig], str | None]
"""Returns why a trial cannot fit into memory; None where it fits, or where its memory is not foreseen."""

Fault = Callable[[], OrchestratorError | None]
"""Returns why a sweep cannot go on; None while it can."""


def make_tuner(
    record: SweepRecord,
    workers: Workers,
    max_concurrent: int,
    stop: StopRequest,
    fault: Fault,
    say: Say,
    unfit_reason: UnfitReason | None,
) -> Any:
    """Make a tuner, or restore the one whose state is in the sweep's folder.

    Args:
        record: the sweep's record.
        workers: train the trials.
        max_concurrent: number of trials that run at a time.
        stop: holds the signal that ends the sweep, once it has arrived.
        fault: returns why the workers cannot go on.
        say: called with messages.
        unfit_reason: says why a trial cannot fit into memory; None where no trial is dropped.

    Raises:
        RecordError: the state in the folder cannot be trusted or read.
    """
    from ray import tune

    from orchestrator.sweep.failures import FailureCounter
    from orchestrator.sweep.interruption import Interrupter
    from orchestrator.sweep.results import ResultKeeper
    from orchestrator.sweep.schedulers.conductor import Conductor
    from orchestrator.sweep.search.factory import make_search_algorithm
    from orchestrator.sweep.search.grid_random import tune_space
    from orchestrator.sweep.search.unfit import point_check
    from orchestrator.sweep.workers.trainable import TrialTrainable

    _quiet_tune()
    spec, paths = record.info.spec, record.paths
    trainable = tune.with_resources(
        tune.with_parameters(TrialTrainable, folder=str(paths.root), workers=workers), {"cpu": TRAINABLE_CPUS}
    )
    check = None if unfit_reason is None else point_check(spec, unfit_reason)
    algorithm = make_search_algorithm(record, max_concurrent, check)
    failures = FailureCounter(record, say)
    interrupter = Interrupter(stop, workers, paths, failures, fault)
    saved = restore_snapshot(paths, say)
    conductor = Conductor(record, max_concurrent, saved, interrupter.check_trial, failures.allow, say)
    callbacks = [ResultKeeper(record, conductor, interrupter.check)]
    new = _new_tuner(record, trainable, algorithm, conductor, callbacks)  # writes tuner.pkl
    if not has_trials(paths):
        return new
    # An earlier driver may have been killed while it wrote tuner.pkl; all of it that matters is given or replaced here.
    space = tune_space(spec.search)
    try:
        tuner = tune.Tuner.restore(str(paths.tune), trainable, param_space=space, resume_unfinished=True)
    except Exception as error:  # damaged JSON or pickles raise almost anything
        raise RecordError(
            f"{paths.tune}: the state of the search cannot be read: {error}",
            f"The trials are kept: `orchestrator best {paths.root}` works. Restore {paths.tune_snapshot.name} from a "
            f"backup, or start a new sweep that learns from them: orchestrator sweep FILE --warm-from {paths.root}",
        ) from error
    replace_parts(tuner, algorithm, conductor, callbacks)
    return tuner


def _new_tuner(record: SweepRecord, trainable: Any, algorithm: Any, conductor: Any, callbacks: list[Any]) -> Any:
    from ray import tune

    from orchestrator.sweep.failures import UNLIMITED
    from orchestrator.sweep.search.grid_random import tune_space

    spec, paths = record.info.spec, record.paths
    return tune.Tuner(
        trainable,
        param_space=tune_space(spec.search),
        tune_config=tune.TuneConfig(
            metric=spec.search.metric,
            mode=spec.search.resolved_mode,
            search_alg=algorithm,
            scheduler=conductor,
            num_samples=spec.search.total_trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=paths.tune.name,
            storage_path=str(paths.root),
            failure_config=tune.FailureConfig(max_failures=UNLIMITED),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def _quiet_tune() -> None:
    """Set Tune's options and silence its output: the user sees the orchestrator's own messages."""
    os.environ.update(TUNE_SETTINGS)
    keep_signal_handlers()
    pass_on_no_keys()
    # Tune writes trials and searcher to disk at each iteration, not every 10 s: a killed driver loses nothing.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    for name in ("ray", "ray.tune", "ray.train", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
