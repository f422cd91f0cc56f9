"""Run one trial in this process, from its configuration to its result on disk."""

from pathlib import Path

from orchestrator.data import load
from orchestrator.errors import OrchestratorError, StorageError, TrialError
from orchestrator.record import TrialPaths, TrialResult, TrialState, read_result, start_of
from orchestrator.signals import Signalled, StopRequest, deferred_signals
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.storage import storage_fault
from orchestrator.training.attempt.attempt import run_alone
from orchestrator.training.attempt.events import Event, Failed, Left
from orchestrator.training.attempt.log_file import output_to
from orchestrator.training.attempt.recorder import TrialRecorder
from orchestrator.training.attempt.watcher import Watcher
from orchestrator.training.engines.memory_limits import MemoryLimits
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.model.device import reset_peak_memory, use_device
from orchestrator.training.write_queue import WriteNow


def run_trial(
    config: TrialConfig,
    spec: SweepSpec,
    paths: TrialPaths,
    data_folder: Path,
    watcher: Watcher,
) -> TrialResult | None:
    """Run a trial to its end, from its last checkpoint if it has one.

    While it runs, this process's standard output and error, where libraries print, go to the trial's log.

    Args:
        config: what to train.
        spec: the experiment, for its metric, tracking and resources.
        paths: where the trial writes. If `result.json` is already there, it is returned as it is.
        data_folder: tokenized rows, from `data.save`.
        watcher: follows the trial, and may end it.

    Returns:
        The result, which is also on disk, or None if the watcher ended the trial.

    Raises:
        TrialError: the trial failed for good; its result is on disk as FAILED.
        StorageError: the disk is full or fails; the next run continues from the last checkpoint.
        Signalled: a signal ended the trial, after a checkpoint of its last step.
    """
    if not paths.result.is_file():
        start = trial_so_far(config, spec, paths)
        with output_to(paths.log):
            _run(start, spec, paths, data_folder, watcher)
        if not paths.result.is_file():
            return None
    result = read_result(paths)
    if result.state == TrialState.FAILED:
        raise TrialError(result.error or "failed in an earlier attempt")
    return result


def trial_so_far(config: TrialConfig, spec: SweepSpec, paths: TrialPaths) -> TrialResult:
    """Return the trial as at its newest whole checkpoint, or as one that has not begun."""
    new = TrialResult(
        trial_id=paths.trial_id,
        state=TrialState.RUNNING,
        config=config,
        metric=spec.search.metric,
        mode=spec.search.resolved_mode,
    )
    return start_of(paths, new)


def _run(start: TrialResult, spec: SweepSpec, paths: TrialPaths, data_folder: Path, watcher: Watcher) -> None:
    gpus = use_device(spec.resources.cpus_per_trial)
    reset_peak_memory()
    with deferred_signals(watcher.say) as stop:
        limits = MemoryLimits()
        while True:
            stop.defers = False  # until there are steps to keep, a signal ends the process at once
            listener = _LocalListener(TrialRecorder(start, paths, spec), watcher, paths, stop)
            try:
                inputs = TrialInputs.load(start.config.base, load(data_folder))
                run_alone(start, paths, inputs, listener, WriteNow(), gpus, limits)
            except StorageError:
                raise
            except OrchestratorError as error:
                listener.emit(Failed(0.0, 0.0, 0.0, error.message, error.remedy, None, error.cause))
            if not listener.needs_less_memory or stop.signal is not None:
                break
            start = trial_so_far(start.config, spec, paths)
    if stop.signal is not None and not paths.result.is_file():
        raise Signalled(stop.signal)


class _LocalListener:
    """Records a trial's events in this process, and lets a watcher or a signal end it."""

    def __init__(self, recorder: TrialRecorder, watcher: Watcher, paths: TrialPaths, stop: StopRequest) -> None:
        self._recorder = recorder
        self._watcher = watcher
        self._paths = paths
        self._stop = stop
        self.needs_less_memory = False
        """Whether the trial has run out of GPU memory, and another attempt takes less."""
        self._is_refused = False
        self._passed_on: set[str] = set()
        self._pass_on_warnings()

    @property
    def stopping(self) -> bool:
        """Whether the watcher or a signal has ended the trial."""
        return self._is_refused or self.wants_checkpoint

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a signal has ended the trial, so that it will continue later."""
        return self._stop.signal is not None

    def on_step(self, step: int, total_steps: int) -> None:
        """Ask the watcher whether to continue.

        From the first step on, a signal waits for the end of the step; after the last step, for the end of the trial.
        """
        self._stop.defers = True
        self._is_refused |= not self._watcher.on_step(step, total_steps)

    def on_progress(self) -> None:
        """Do nothing: nobody watches this process for a hang."""

    def emit(self, event: Event) -> None:
        """Record an event, and ask the watcher after an evaluation.

        Raises:
            StorageError: the disk refused the event or has ended the trial, so that nothing more can be recorded.
        """
        if isinstance(event, Left) and event.is_memory:
            self.needs_less_memory = True
        elif isinstance(event, Left) and event.lost is not None:
            if event.is_storage:
                raise _storage_error(self._paths, event.lost)
            # No other attempt follows in this process: the trial has failed.
            usage = (event.seconds, event.gpu_seconds, event.peak_memory_gib)
            event = Failed(*usage, event.lost, f"Its log: {self._paths.log}", None, "infrastructure")
        try:
            point = self._recorder.record(event)
        except OSError as error:
            if fault := storage_fault(error):
                raise _storage_error(self._paths, fault) from error
            raise
        self._pass_on_warnings()
        if point is not None:
            self._is_refused |= not self._watcher.on_report(point)

    def _pass_on_warnings(self) -> None:
        """Pass each warning to the watcher once."""
        for warning in self._recorder.warnings:
            if warning not in self._passed_on:
                self._passed_on.add(warning)
                self._watcher.say(f"warning: {warning}")


def _storage_error(paths: TrialPaths, fault: str) -> StorageError:
    return StorageError(
        f"{paths.sweep}: the trial is interrupted because its storage fails: {fault}",
        f"Free space or repair the storage, then continue with: orchestrator resume {paths.sweep}",
    )
