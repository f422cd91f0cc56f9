"""The public Python API: start, resume and open a sweep. Import its functions from `orchestrator`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.deploy import FinishedSweep, open_sweep
from orchestrator.record import MetricPoint, SweepRecord, TrialResult
from orchestrator.spec import SweepSpec

__all__ = ["open_sweep", "resume", "run"]

Watch = Callable[[list[TrialResult]], None]
"""Called with all trials that have started, best first, whenever one of them changes."""

Say = Callable[[str], None]
"""Called with messages to the user, such as warnings."""


def run(
    spec: SweepSpec,
    name: str | None = None,
    output: str | Path | None = None,
    *,
    without_search: bool = False,
    address: str | None = None,
    watch: Watch = lambda _: None,
    say: Say = print,
) -> FinishedSweep:
    """Run an experiment and return the finished sweep.

    Trials that fail do not raise: `FinishedSweep.trials()` shows them with their states and errors.

    Args:
        spec: the experiment, from `load_spec`.
        name: the name of the sweep's folder; default `output.name` of the experiment, else "sweep" and the time.
        output: the parent folder of sweeps; default `output.folder` of the experiment.
        without_search: run one trial with the experiment's own values in this process, without Ray.
        address: a Ray cluster, "auto" or "HOST:PORT"; default Ray is started on this machine.
        watch: called with all trials whenever one changes; not called with `without_search`.
        say: called with messages.

    Raises:
        RequestError: the request is wrong; nothing has been written.
        ClusterError: Ray cannot be reached, or its nodes do not share the output folder.
        SweepError: no trial of the sweep finished.
        TrialError: the trial failed; with `without_search` only.
        Interrupted: a signal ended the sweep; `resume` continues it.
        Signalled: the same with `without_search`; it is a KeyboardInterrupt.
        StorageError: the disk is full or fails; `resume` continues the sweep.
    """
    from orchestrator.record.new_sweep import claim_folder

    with claim_folder(spec, "sweep", name, None if output is None else str(output)) as paths:
        if without_search:
            from orchestrator.training.local import run_local_trial

            run_local_trial(spec, paths, _Follower(say))
        else:
            from orchestrator.sweep import run_sweep

            run_sweep(spec, paths, watch, address, say)
    return open_sweep(paths.root)


def resume(
    sweep: str | Path,
    output: str | Path = "runs",
    *,
    num_trials: int | None = None,
    budget: Sequence[str] = (),
    address: str | None = None,
    watch: Watch = lambda _: None,
    say: Say = print,
) -> FinishedSweep:
    """Continue an interrupted sweep and return it. Finished trials do not run again.

    Args:
        sweep: the sweep's folder, or its name under `output`.
        output: the parent folder of sweeps.
        num_trials: a new total number of trials, larger than the present one.
        budget: new limits, such as `["gpu_hours=20"]`, for fields of `search.budget`.
        address: a Ray cluster, "auto" or "HOST:PORT"; default Ray is started on this machine.
        watch: called with all trials whenever one changes; not called for a sweep of one trial without search.
        say: called with messages.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
        RequestError: another process runs the sweep, or it cannot have these trials or limits.
        OrchestratorError: the errors that `run` raises.
    """
    from orchestrator.record import read_sweep
    from orchestrator.record.extend import extend_sweep

    record: SweepRecord = extend_sweep(read_sweep(sweep, output), num_trials, budget)
    if record.info.is_single_trial:
        from orchestrator.training.local import resume_local_trial

        resume_local_trial(record, _Follower(say))
    else:
        from orchestrator.sweep import resume_sweep

        resume_sweep(record, watch, address, say)
    return open_sweep(record.paths.root)


class _Follower:
    """A `Watcher` that passes messages on and never stops the trial."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def on_step(self, step: int, total_steps: int) -> bool:
        return True

    def on_report(self, point: MetricPoint) -> bool:
        values = ", ".join(f"{name} {value:.4g}" for name, value in point.values.items())
        self._say(f"step {point.step}: {values}")
        return True

    def say(self, sentence: str) -> None:
        self._say(sentence)
