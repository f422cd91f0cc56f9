"""A sweep from its first trial to its last, and on again after an interruption."""

import logging
import os
from typing import Any

from orchestrator.cluster import connection, require_shared_folder
from orchestrator.errors import Interrupted, RequestError, SweepError
from orchestrator.record import SweepPaths, SweepRecord, TrialState
from orchestrator.record.lock import only_driver
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import ResourcesSection
from orchestrator.sweep.follow import Watch, follow
from orchestrator.sweep.keeper import ResultKeeper, cancel_unknown
from orchestrator.sweep.schedulers import make_scheduler
from orchestrator.sweep.search import make_searcher, tune_space
from orchestrator.sweep.snapshot import put_snapshot_back
from orchestrator.sweep.trainable import QloraTrial
from orchestrator.training.start import start_sweep


def run_sweep(spec: SweepSpec, paths: SweepPaths, watch: Watch, address: str | None = None) -> SweepRecord:
    """Run all trials of an experiment.

    Args:
        spec: the experiment.
        paths: a folder that does not exist yet, from `record.start.choose_folder`.
        watch: follows.
        address: of a Ray cluster; None starts Ray here.

    Raises:
        RequestError: base or data are not what the experiment says; nothing is written.
        ClusterError: Ray cannot be reached, or its nodes do not share the folder.
        SweepError: no trial finished, or Ray Tune gave up.
        Interrupted: Ctrl-C.
    """
    with connection(address):
        require_shared_folder(paths.root.parent)
        resources = trial_resources(spec.resources, address)
        info = start_sweep(spec, paths)
        return _drive(SweepRecord(paths, info), watch, resources)


def resume_sweep(record: SweepRecord, watch: Watch, address: str | None = None) -> SweepRecord:
    """Go on with a sweep whose driver died or was interrupted. Finished trials do not run again.

    Raises:
        As `run_sweep`.
    """
    with connection(address):
        require_shared_folder(record.paths.root)
        return _drive(record, watch, trial_resources(record.info.spec.resources, address))


def _drive(record: SweepRecord, watch: Watch, resources: dict[str, float]) -> SweepRecord:
    from ray.tune.error import TuneError

    with only_driver(record.paths):
        tuner = _make_tuner(record, resources)
        try:
            with follow(record, watch):
                tuner.fit()
        except TuneError as error:
            raise SweepError(
                f"Ray Tune gave up: {str(error).strip().splitlines()[-1]}",
                f"What was measured is kept; go on with: orchestrator resume {record.paths.root}",
            ) from error
        cancel_unknown(record)
    return _conclude(record)


def _make_tuner(record: SweepRecord, resources: dict[str, float]) -> Any:
    """A new tuner, or the one whose state lies in the sweep's folder."""
    from ray import tune

    _quiet_tune()
    spec, paths = record.info.spec, record.paths
    trainable = tune.with_resources(tune.with_parameters(QloraTrial, folder=str(paths.root)), resources)
    put_snapshot_back(paths)
    if tune.Tuner.can_restore(str(paths.tune)):
        return tune.Tuner.restore(
            str(paths.tune), trainable, param_space=tune_space(spec.search), resume_unfinished=True
        )
    return tune.Tuner(
        trainable,
        param_space=tune_space(spec.search),
        tune_config=tune.TuneConfig(
            metric=spec.search.metric,
            mode=spec.search.resolved_mode,
            search_alg=make_searcher(spec.search, spec.resources.max_concurrent),
            scheduler=make_scheduler(spec),
            num_samples=1 if spec.search.algorithm == "grid" else spec.search.total_trials,
            max_concurrent_trials=spec.resources.max_concurrent if spec.search.algorithm == "optuna" else None,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=paths.tune.name,
            storage_path=str(paths.root),
            failure_config=tune.FailureConfig(max_failures=spec.resources.max_failures),
            callbacks=[ResultKeeper()],
            verbose=0,
        ),
    )


def trial_resources(resources: ResourcesSection, address: str | None) -> dict[str, float]:
    """What Ray sets aside for each trial: `cpu` and `gpu`, a share of one where trials share it.

    Raises:
        RequestError: `auto` on a cluster that has no GPU now (it may be about to start some: training a night long on
            CPUs is nothing to guess at), or more than a machine that cannot grow has, where Ray would wait for ever.
    """
    import ray

    there = ray.cluster_resources()
    gpus, cpus = there.get("GPU", 0), there.get("CPU", 0)
    whole = resources.gpus_per_trial
    if whole == "auto":
        whole = 1 if gpus >= 1 else 0
        if address is not None and not whole:
            raise RequestError(
                f"resources.gpus_per_trial is auto, but the cluster at {address} has no GPU at this moment",
                "Say resources.gpus_per_trial=1 (GPU workers will be started and waited for) or =0 (train on CPUs).",
            )
    if address is None and (whole > gpus or resources.cpus_per_trial > cpus):
        raise RequestError(
            f"a trial takes {whole} GPUs, {resources.cpus_per_trial} cores; this machine has {gpus:g} and {cpus:g}",
            "Change resources.gpus_per_trial (auto takes what there is) or cpus_per_trial, or give --address.",
        )
    return {"cpu": resources.cpus_per_trial, "gpu": whole / resources.trials_per_gpu}


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


def _conclude(record: SweepRecord) -> SweepRecord:
    trials = record.trials()
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.STOPPED, TrialState.FAILED)]
    total = record.info.num_trials
    if len(ended) < total:
        raise Interrupted(
            f"interrupted with {len(ended)} of {total} trials ended; their results are kept",
            f"Go on with: orchestrator resume {record.paths.root}",
        )
    if not any(trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in trials):
        first = next(trial for trial in trials if trial.error)
        raise SweepError(
            f"all {len(trials)} trials failed; the first one: {first.error}",
            f"Its log: {record.paths.trial(first.trial_id).log}",
        )
    return record
