"""Run one trial in this process, without Ray. It is a sweep of one trial, with the same records."""

import os
import uuid
from contextlib import suppress

from orchestrator.base_folder import as_stored
from orchestrator.errors import RequestError, TrialError
from orchestrator.imports import importing, leave_out_compiler
from orchestrator.record import ExperimentSource, SweepPaths, SweepRecord, TrialResult
from orchestrator.record.lock import only_driver
from orchestrator.record.rows import notes_on_rows
from orchestrator.remote.mirror import mirroring
from orchestrator.spec import SweepSpec
from orchestrator.spec.optional_packages import require_extras
from orchestrator.spec.sections import ResourcesSection
from orchestrator.tracking.catch_up import catch_up
from orchestrator.tracking.servers import require_servers, server_faults
from orchestrator.training.attempt.watcher import Watcher
from orchestrator.training.fast.warmup import precompile
from orchestrator.training.start import repair_sweep, start_sweep


def run_local_trial(
    spec: SweepSpec,
    paths: SweepPaths,
    watcher: Watcher,
    source: ExperimentSource | None = None,
) -> TrialResult | None:
    """Run the experiment's own values, without a search, as one trial.

    Args:
        spec: the experiment.
        paths: a folder that does not exist yet.
        watcher: follows the trial, and may end it.
        source: where the experiment was read from.

    Returns:
        The result, or None if the watcher ended the trial.

    Raises:
        RequestError: base, data or GPUs do not match the experiment, or a tracker's server refuses. Nothing is written.
        TrialError: the trial failed; its record says why.
        StorageError: the disk is full or fails; `resume_local_trial` continues.
        Signalled: a signal ended the trial; `resume_local_trial` continues.
    """
    require_servers(spec.tracking)
    spec, notes = as_stored(spec)
    for note in notes:
        watcher.say(f"note: {note}")
    _take_device(spec)
    info = start_sweep(spec, paths, source, is_single_trial=True)
    for note in notes_on_rows(info):
        watcher.say(note)
    return _run(SweepRecord(paths, info), uuid.uuid4().hex[:8], watcher)


def resume_local_trial(record: SweepRecord, watcher: Watcher) -> TrialResult | None:
    """Continue a trial that was interrupted. A finished one is returned as it is.

    Raises:
        RequestError, TrialError, StorageError, Signalled: as `run_local_trial` does.
    """
    require_extras(record.info.spec)
    for fault in server_faults(record.info.spec.tracking):
        watcher.say(f"warning: {fault.message}")
    _take_device(record.info.spec)
    trial_ids = record.paths.trial_ids()
    return _run(record, trial_ids[0] if trial_ids else uuid.uuid4().hex[:8], watcher)


def _take_device(spec: SweepSpec) -> None:
    """Restrict this process to the trial's GPUs; if there are any, start to compile the kernels in the background.

    Raises:
        RequestError: see `take_gpus`; or the base is to be in pieces, for which there are no other processes.
    """
    if spec.num_shards > 1:
        raise RequestError(
            "resources.strategy shard: a single trial has one process, which cannot hold all pieces of a base",
            "Run it as a sweep with search.num_trials=1, or set resources.strategy to pipeline.",
        )
    if take_gpus(spec.resources):
        precompile.start([spec.trial_config({})], num_slots=1)


def _run(record: SweepRecord, trial_id: str, watcher: Watcher) -> TrialResult | None:
    leave_out_compiler()
    with importing():  # takes seconds; bad rows have been reported by now
        from orchestrator.training.trial import run_trial

    spec, paths = record.info.spec, record.paths
    with only_driver(paths), mirroring(paths, watcher.say):
        repair_sweep(record, watcher.say)
        try:
            result = run_trial(spec.trial_config({}), spec, paths.trial(trial_id), paths.data, watcher)
        except TrialError:
            with suppress(OSError):  # must not hide why the trial failed
                catch_up(record, watcher.say)
            raise
        catch_up(record, watcher.say)
        return result


def take_gpus(resources: ResourcesSection) -> bool:
    """Restrict this process to the GPUs that its trial takes. Otherwise the Trainer would use all of them.

    Returns:
        Whether there are any.

    Raises:
        RequestError: this machine has fewer than the experiment asks for.
    """
    import torch

    wanted = 1 if resources.gpus_per_trial == "auto" else resources.gpus_per_trial
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else [str(i) for i in range(wanted)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:wanted])  # read when CUDA starts, not at import
    if resources.gpus_per_trial != "auto" and torch.cuda.device_count() < wanted:
        raise RequestError(
            f"resources.gpus_per_trial={wanted}, but this machine has {torch.cuda.device_count()} GPUs",
            "Set it to the number that this machine has; auto takes one GPU, or none where there is none.",
        )
    return bool(torch.cuda.is_available())
