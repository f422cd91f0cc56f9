"""A sweep from its first trial to its last, and on again after an interruption.

Ray Tune takes seconds to import. That is done once the workers have been started, which import more.
"""

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

from orchestrator.base import import_tokenizers
from orchestrator.cluster import connection, require_shared_folder
from orchestrator.data import load
from orchestrator.errors import Interrupted, SweepError
from orchestrator.imports import begin
from orchestrator.record import OPEN, SweepPaths, SweepRecord, TrialState
from orchestrator.record.lock import only_driver
from orchestrator.spec import SweepSpec
from orchestrator.spec.effect import require_effect
from orchestrator.spec.extras import require_extras
from orchestrator.sweep.fleet import RELAY_CPUS, Fleet, compiling_early, start_fleet
from orchestrator.sweep.follow import Watch, follow
from orchestrator.sweep.lease import Workers
from orchestrator.sweep.snapshot import put_snapshot_back
from orchestrator.tracking.catch_up import catch_up
from orchestrator.tracking.servers import require_servers, server_faults
from orchestrator.training.start import start_sweep
from orchestrator.words import counted

Say = Callable[[str], None]
"""Takes a sentence for whoever has started the sweep."""


def run_sweep(
    spec: SweepSpec, paths: SweepPaths, watch: Watch, address: str | None = None, say: Say = lambda _: None
) -> SweepRecord:
    """Run all trials of an experiment.

    Args:
        spec: the experiment.
        paths: a folder that does not exist yet, from `record.start.choose_folder`.
        watch: follows.
        address: of a Ray cluster; None starts Ray here.
        say: is told of the workers, before the first trial.

    Raises:
        RequestError: base or data are not what the experiment says, a package is missing, the scheduler would change
            nothing, or a tracker's server does not take the sweep; nothing is written.
        ClusterError: Ray cannot be reached, or its nodes do not share the folder.
        SweepError: no trial finished, or Ray Tune gave up.
        Interrupted: Ctrl-C.
    """
    require_extras(spec)
    require_effect(spec)
    require_servers(spec.tracking)
    imports = begin(import_tokenizers)  # Ray takes about as long to start
    with compiling_early(spec, address), connection(address), start_fleet(spec, address) as fleet:
        require_shared_folder(paths.root.parent)
        imports.join()
        info = start_sweep(spec, paths)
        with only_driver(paths):
            return _drive(SweepRecord(paths, info), fleet, watch, say)


def resume_sweep(
    record: SweepRecord, watch: Watch, address: str | None = None, say: Say = lambda _: None
) -> SweepRecord:
    """Go on with a sweep whose driver died or was interrupted. Finished trials do not run again.

    A tracker's server that does not answer is a warning: the sweep has begun, and its trackers can catch up later.

    Raises:
        As `run_sweep`.
    """
    require_extras(record.info.spec)
    spec = record.info.spec
    for fault in server_faults(spec.tracking):
        say(f"warning: {fault.message}")
    with (
        only_driver(record.paths),
        compiling_early(spec, address),
        connection(address),
        start_fleet(spec, address) as fleet,
    ):
        require_shared_folder(record.paths.root)
        return _drive(record, fleet, watch, say)


def _drive(record: SweepRecord, fleet: Fleet, watch: Watch, say: Say) -> SweepRecord:
    from ray.tune.error import TuneError

    from orchestrator.sweep.keeper import cancel_unknown

    spec = record.info.spec
    workers, num_slots, chosen = fleet.open(load(record.paths.data, in_memory=True), record.paths)
    say(chosen)
    tuner = _make_tuner(record, workers, min(num_slots, spec.resources.max_concurrent or num_slots))
    try:
        with follow(record, watch):
            tuner.fit()
    except TuneError as error:
        raise SweepError(
            f"Ray Tune gave up: {str(error).strip().splitlines()[-1]}",
            f"What was measured is kept; go on with: orchestrator resume {record.paths.root}",
        ) from error
    cancel_unknown(record)
    catch_up(record, say)
    if over := record.budget_spent():
        begun = len(record.paths.trial_ids())
        say(f"{over}: {begun} of {counted(record.info.num_trials, 'trial')} begun")
    _conclude(record)
    for trial_id in record.paths.trial_ids():
        shutil.rmtree(record.paths.trial(trial_id).offers, ignore_errors=True)
    return record


def _make_tuner(record: SweepRecord, workers: Workers, at_once: int) -> Any:
    """A new tuner, or the one whose state lies in the sweep's folder; it runs so many trials at once."""
    from ray import tune

    from orchestrator.sweep.conductor import Conductor
    from orchestrator.sweep.keeper import ResultKeeper
    from orchestrator.sweep.relay import Relay
    from orchestrator.sweep.search import make_searcher, tune_space

    _quiet_tune()
    spec, paths = record.info.spec, record.paths
    trainable = tune.with_resources(
        tune.with_parameters(Relay, folder=str(paths.root), workers=workers), {"cpu": RELAY_CPUS}
    )
    searcher = make_searcher(spec, at_once)
    conductor = Conductor(record, at_once, put_snapshot_back(paths))
    callbacks = [ResultKeeper(conductor)]
    if tune.Tuner.can_restore(str(paths.tune)):
        tuner = tune.Tuner.restore(
            str(paths.tune), trainable, param_space=tune_space(spec.search), resume_unfinished=True
        )
        # The one that was pickled knows how many trials the workers of then had room for.
        tuner._local_tuner._tune_config.search_alg = searcher
        tuner._local_tuner._tune_config.scheduler = conductor
        tuner._local_tuner._run_config.callbacks = callbacks
        return tuner
    return tune.Tuner(
        trainable,
        param_space=tune_space(spec.search),
        tune_config=tune.TuneConfig(
            metric=spec.search.metric,
            mode=spec.search.resolved_mode,
            search_alg=searcher,
            scheduler=conductor,
            num_samples=spec.search.total_trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=paths.tune.name,
            storage_path=str(paths.root),
            failure_config=tune.FailureConfig(max_failures=spec.resources.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def _quiet_tune() -> None:
    """A person sees our lines. Trackers are ours, so Tune's own loggers would double them."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints a table at verbosity 0 too
    # Trials and searcher go to disk at every turn of Tune's loop, not every 10 s: a killed driver loses nothing.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    for name in ("ray", "ray.tune", "ray.train", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _conclude(record: SweepRecord) -> None:
    trials = record.trials()
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.STOPPED, TrialState.FAILED)]
    total = record.info.num_trials
    is_over = record.budget_spent() and all(trial.state not in OPEN for trial in trials)
    if len(ended) < total and not is_over:
        raise Interrupted(
            f"interrupted with {len(ended)} of {counted(total, 'trial')} ended; their results are kept",
            f"Go on with: orchestrator resume {record.paths.root}",
        )
    if not any(trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in trials):
        first = next((trial for trial in trials if trial.error), None)
        if first is None:
            raise SweepError("the budget was spent before a trial began", "Give search.budget more, in a new sweep.")
        log = record.paths.trial(first.trial_id).log
        raise SweepError(
            f"all of {counted(len(trials), 'trial')} failed; the first one: {first.error}",
            f"Its log: {log}" if log.is_file() else f"The workers' logs: {record.paths.workers}",
        )
