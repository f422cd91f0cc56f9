"""A sweep from its first trial to its last, and on again after an interruption.

Ray Tune takes seconds to import. That is done once the workers have been started, which import more.
"""

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, NoReturn

from orchestrator.base import import_tokenizers
from orchestrator.cluster import connection, require_shared_folder
from orchestrator.data import load
from orchestrator.errors import Interrupted, SweepError
from orchestrator.imports import begin
from orchestrator.record import OPEN, ExperimentSource, SweepPaths, SweepRecord, TrialResult, TrialState
from orchestrator.record.extend import save_extension
from orchestrator.record.lock import only_driver
from orchestrator.signals import StopRequest, deferred_signals, signal_name
from orchestrator.spec import SweepSpec
from orchestrator.spec.optional_packages import require_extras
from orchestrator.spec.scheduler_effect import require_scheduler_effect
from orchestrator.storage import storage_fault
from orchestrator.sweep.follow import Watch, follow
from orchestrator.sweep.snapshot import put_snapshot_back
from orchestrator.sweep.workers.fleet import RELAY_CPUS, Fleet, compiling_early, start_fleet
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.tracking.catch_up import catch_up
from orchestrator.tracking.servers import require_servers, server_faults
from orchestrator.training.start import start_sweep
from orchestrator.words import counted

Say = Callable[[str], None]
"""Takes a sentence for whoever has started the sweep."""


def run_sweep(
    spec: SweepSpec,
    paths: SweepPaths,
    watch: Watch,
    address: str | None = None,
    say: Say = lambda _: None,
    source: ExperimentSource | None = None,
) -> SweepRecord:
    """Run all trials of an experiment.

    Args:
        spec: the experiment.
        paths: a folder that does not exist yet, or the empty one from `record.new_sweep.claim_folder`.
        watch: follows.
        address: of a Ray cluster; None starts Ray here.
        say: takes sentences on the workers and on what the sweep waits for.
        source: where the experiment was read from.

    Raises:
        RequestError: base or data are not what the experiment says, a package is missing, the scheduler would change
            nothing, or a tracker's server does not take the sweep; nothing is written.
        ClusterError: Ray cannot be reached, or its nodes do not share the folder.
        SweepError: no trial finished, or Ray Tune gave up.
        Interrupted: a signal: Ctrl-C, SIGTERM or SIGHUP. Trials have written a checkpoint of their last step.
        StorageError: the disk is full or fails.
    """
    require_extras(spec)
    require_scheduler_effect(spec)
    require_servers(spec.tracking)
    imports = begin(import_tokenizers)  # Ray takes about as long to start
    with compiling_early(spec, address), connection(address), start_fleet(spec, address) as fleet:
        require_shared_folder(paths.root.parent)
        imports.join()
        info = start_sweep(spec, paths, source)
        with only_driver(paths):
            return _drive(SweepRecord(paths, info), fleet, watch, say)


def resume_sweep(
    record: SweepRecord, watch: Watch, address: str | None = None, say: Say = lambda _: None
) -> SweepRecord:
    """Go on with a sweep whose driver died or was interrupted. Finished trials do not run again.

    Changes that `record.extend.extend_sweep` has made to the record are written before the first trial. A tracker's
    server that does not answer is a warning: the sweep has begun, and its trackers can catch up later.

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
        save_extension(record)
        return _drive(record, fleet, watch, say)


def _drive(record: SweepRecord, fleet: Fleet, watch: Watch, say: Say) -> SweepRecord:
    from ray.tune.error import TuneError

    from orchestrator.sweep.interruption import Interruption, storage_error
    from orchestrator.sweep.results import cancel_unknown

    spec = record.info.spec
    workers, num_slots, chosen = fleet.open(load(record.paths.data, in_memory=True), record.paths, say)
    say(chosen)
    at_once = min(num_slots, spec.resources.max_concurrent or num_slots)
    with deferred_signals(say) as stop:
        try:
            tuner = _make_tuner(record, workers, at_once, stop)
            with follow(record, watch):
                tuner.fit()
        except Interruption:
            assert stop.signal is not None
            _tell_interruption(record, f"by {signal_name(stop.signal)}", 128 + stop.signal)
        except (OSError, TuneError) as error:
            if fault := storage_fault(error):
                raise storage_error(record.paths, fault) from error
            if isinstance(error, OSError):
                raise
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
        shutil.rmtree(record.paths.trial(trial_id).exploit_checkpoints, ignore_errors=True)
    return record


def _make_tuner(record: SweepRecord, workers: Workers, at_once: int, stop: StopRequest) -> Any:
    """Make a tuner, or restore the one whose state lies in the sweep's folder.

    Args:
        record: of the sweep.
        workers: train its trials.
        at_once: trials that run at a time.
        stop: ends it.
    """
    from ray import tune

    from orchestrator.sweep.interruption import Interrupter
    from orchestrator.sweep.results import ResultKeeper
    from orchestrator.sweep.schedulers.conductor import Conductor
    from orchestrator.sweep.search.algorithms import make_search_algorithm, tune_space
    from orchestrator.sweep.workers.trainable import TrialTrainable

    _quiet_tune()
    spec, paths = record.info.spec, record.paths
    trainable = tune.with_resources(
        tune.with_parameters(TrialTrainable, folder=str(paths.root), workers=workers), {"cpu": RELAY_CPUS}
    )
    algorithm = make_search_algorithm(spec, at_once, is_over=record.budget_spent() is not None)
    interrupter = Interrupter(stop, workers, paths)
    conductor = Conductor(record, at_once, put_snapshot_back(paths), interrupter.check_trial)
    callbacks = [ResultKeeper(record, conductor, interrupter.check)]
    if tune.Tuner.can_restore(str(paths.tune)):
        tuner = tune.Tuner.restore(
            str(paths.tune), trainable, param_space=tune_space(spec.search), resume_unfinished=True
        )
        # The one that was pickled knows how many trials the workers of then had room for.
        tuner._local_tuner._tune_config.search_alg = algorithm
        tuner._local_tuner._tune_config.scheduler = conductor
        tuner._local_tuner._run_config.callbacks = callbacks
        return tuner
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
            failure_config=tune.FailureConfig(max_failures=spec.resources.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def _quiet_tune() -> None:
    """A person sees our lines. Trackers are ours, so Tune's own loggers would double them."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # `signals` has one, for other signals too
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints a table at verbosity 0 too
    # Trials and searcher go to disk at every turn of Tune's loop, not every 10 s: a killed driver loses nothing.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    for name in ("ray", "ray.tune", "ray.train", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _conclude(record: SweepRecord) -> None:
    trials = record.trials()
    is_over = record.budget_spent() and all(trial.state not in OPEN for trial in trials)
    if len(_ended(trials)) < record.info.num_trials and not is_over:
        _tell_interruption(record, "before its end")
    if not any(trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in trials):
        first = next((trial for trial in trials if trial.error), None)
        if first is None:
            more = f"Give it more: orchestrator resume {record.paths.root} --budget LIMIT=V"
            raise SweepError("the budget was spent before a trial finished", more)
        log = record.paths.trial(first.trial_id).log
        raise SweepError(
            f"all of {counted(len(trials), 'trial')} failed; the first one: {first.error}",
            f"Its log: {log}" if log.is_file() else f"The workers' logs: {record.paths.workers}",
        )


def _ended(trials: list[TrialResult]) -> list[TrialResult]:
    return [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.STOPPED, TrialState.FAILED)]


def _tell_interruption(record: SweepRecord, how: str, exit_code: int = Interrupted.exit_code) -> NoReturn:
    ended, total = len(_ended(record.trials())), record.info.num_trials
    raise Interrupted(
        f"interrupted {how} with {ended} of {counted(total, 'trial')} ended; the others go on from their last steps",
        f"Go on with: orchestrator resume {record.paths.root}",
        exit_code,
    )
