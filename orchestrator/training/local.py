"""One trial here, without Ray: a sweep of one, with the same records."""

import os
import uuid

from orchestrator.record import SweepPaths, SweepRecord, TrialResult
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import ResourcesSection
from orchestrator.training.start import start_sweep
from orchestrator.training.watcher import Watcher


def run_local_trial(spec: SweepSpec, paths: SweepPaths, watcher: Watcher) -> TrialResult | None:
    """Run the experiment's own values (no search) as one trial.

    Raises:
        RequestError: base or data are not what the experiment says; nothing is written.
        TrialError: the trial failed; its record says why.
    """
    take_gpus(spec.resources)
    info = start_sweep(spec, paths, is_single_trial=True)
    from orchestrator.training.trial import run_trial  # seconds of imports: a bad row is told before them

    trial_id = uuid.uuid4().hex[:8]
    return run_trial(spec.trial_config({}), info.spec, paths.trial(trial_id), paths.data, watcher)


def resume_local_trial(record: SweepRecord, watcher: Watcher) -> TrialResult | None:
    """Go on with a trial that was interrupted; a finished one is returned as it is."""
    from orchestrator.training.trial import run_trial

    take_gpus(record.info.spec.resources)
    ids = record.paths.trial_ids()
    paths = record.paths.trial(ids[0] if ids else uuid.uuid4().hex[:8])
    return run_trial(record.info.spec.trial_config({}), record.info.spec, paths, record.paths.data, watcher)


def take_gpus(resources: ResourcesSection) -> None:
    """Show this process only the GPUs that its trial takes (the Trainer would otherwise spread over all of them)."""
    wanted = 1 if resources.gpus_per_trial == "auto" else resources.gpus_per_trial
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else [str(i) for i in range(wanted)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:wanted])
