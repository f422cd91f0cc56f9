"""One trial in this process, from its configuration to its result on disk."""

from pathlib import Path

from orchestrator.data import load
from orchestrator.errors import OrchestratorError, StorageError, TrialError
from orchestrator.record import TrialPaths, TrialResult, TrialState, read_result, resumable
from orchestrator.signals import Signalled, StopRequest, deferred_signals
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.storage import storage_fault
from orchestrator.training.attempt.attempt import run_alone
from orchestrator.training.attempt.events import Event, Failed, Left, WriteNow
from orchestrator.training.attempt.log_file import output_to
from orchestrator.training.attempt.recorder import TrialRecorder
from orchestrator.training.attempt.watcher import Watcher
from orchestrator.training.engines.loop import TrialInputs
from orchestrator.training.model.device import reset_peak_memory, use_device


def run_trial(
    config: TrialConfig,
    spec: SweepSpec,
    paths: TrialPaths,
    data_folder: Path,
    watcher: Watcher,
) -> TrialResult | None:
    """Run a trial to its end, from its last checkpoint if it has one.

    What libraries print meanwhile, on this process's standard output and error, goes to the trial's log.

    Args:
        config: what to train.
        spec: the experiment, for its metric, tracking and resources.
        paths: where the trial writes. A `result.json` that is there already is returned as it is.
        data_folder: tokenised rows, from `data.save`.
        watcher: follows, and may end the trial.

    Returns:
        The result, also on disk, or None if the watcher ended the trial.

    Raises:
        TrialError: the trial failed for good; its result is on disk as FAILED.
        StorageError: the disk is full or fails; the trial goes on from its last checkpoint when it is run again.
        Signalled: a signal ended the trial, after a checkpoint of its last step.
    """
    if not paths.result.is_file():
        start = start_of(config, spec, paths)
        with output_to(paths.log):
            _run(start, spec, paths, data_folder, watcher)
        if not paths.result.is_file():
            return None
    result = read_result(paths)
    if result.state == TrialState.FAILED:
        raise TrialError(result.error or "failed in an earlier attempt")
    return result


def start_of(config: TrialConfig, spec: SweepSpec, paths: TrialPaths) -> TrialResult:
    """The trial so far, as at its last complete checkpoint; or as one that has not begun."""
    return resumable(paths, config) or TrialResult(
        trial_id=paths.trial_id,
        state=TrialState.RUNNING,
        config=config,
        metric=spec.search.metric,
        mode=spec.search.resolved_mode,
    )


def _run(start: TrialResult, spec: SweepSpec, paths: TrialPaths, data_folder: Path, watcher: Watcher) -> None:
    books = TrialRecorder(start, paths, spec)
    gpus = use_device(spec.resources.cpus_per_trial)
    reset_peak_memory()
    with deferred_signals(watcher.say) as stop:
        stop.defers = False  # until there are steps to keep
        listener = _Here(books, watcher, paths, stop)
        try:
            ground = TrialInputs.of(start.config.base, load(data_folder))
            run_alone(start, paths, ground, listener, WriteNow(), gpus)
        except StorageError:
            raise
        except OrchestratorError as error:
            listener.emit(Failed(0.0, 0.0, 0.0, error.message, error.remedy, None, error.cause))
    if stop.signal is not None and not paths.result.is_file():
        raise Signalled(stop.signal)


class _Here:
    """Keeps the books of a trial in this process, and lets a watcher or a signal end it."""

    def __init__(self, books: TrialRecorder, watcher: Watcher, paths: TrialPaths, stop: StopRequest) -> None:
        self._books = books
        self._watcher = watcher
        self._paths = paths
        self._stop = stop
        self._is_refused = False
        self._said: set[str] = set()
        self._say_warnings()

    @property
    def stopping(self) -> bool:
        """Whether the watcher or a signal has ended the trial."""
        return self._is_refused or self.wants_checkpoint

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a signal has ended the trial, which will go on later."""
        return self._stop.signal is not None

    def on_step(self, step: int, total_steps: int) -> None:
        """Ask the watcher. From now on a signal waits for the end of a step; after the last, for that of the trial."""
        self._stop.defers = True
        self._is_refused |= not self._watcher.on_step(step, total_steps)

    def emit(self, event: Event) -> None:
        """Record an event, and ask the watcher after an evaluation.

        Raises:
            StorageError: the disk does not take it, or has ended the trial; nothing more can be recorded.
        """
        if isinstance(event, Left) and event.lost is not None:
            if event.is_storage:
                raise _storage_error(self._paths, event.lost)
            # There is no other attempt.
            usage = (event.seconds, event.gpu_seconds, event.peak_memory_gib)
            event = Failed(*usage, event.lost, f"Its log: {self._paths.log}", None, "infrastructure")
        try:
            point = self._books.enter(event)
        except OSError as error:
            if fault := storage_fault(error):
                raise _storage_error(self._paths, fault) from error
            raise
        self._say_warnings()
        if point is not None:
            self._is_refused |= not self._watcher.on_report(point)

    def _say_warnings(self) -> None:
        """Pass each warning on once."""
        for warning in self._books.warnings:
            if warning not in self._said:
                self._said.add(warning)
                self._watcher.say(f"warning: {warning}")


def _storage_error(paths: TrialPaths, fault: str) -> StorageError:
    return StorageError(
        f"{paths.sweep}: the trial is interrupted, for its storage fails: {fault}",
        f"Make room or mend the storage, then go on with: orchestrator resume {paths.sweep}",
    )
