"""One trial in this process, from its configuration to its result on disk."""

import time
from pathlib import Path

from orchestrator.data import load
from orchestrator.errors import OrchestratorError, TrialError
from orchestrator.record import TrialPaths, TrialResult, TrialState, read_result, resumable
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.attempt import run_alone
from orchestrator.training.books import Books
from orchestrator.training.device import reset_peak_memory, use_device
from orchestrator.training.events import AtOnce, Event, Failed, Left
from orchestrator.training.log_file import output_to
from orchestrator.training.loop import Ground
from orchestrator.training.watcher import Watcher


def run_trial(
    config: TrialConfig, spec: SweepSpec, paths: TrialPaths, data_folder: Path, watcher: Watcher
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
    books, began = Books(start, paths, spec), time.monotonic()
    listener = _Here(books, watcher, paths)
    gpus = use_device(spec.resources.cpus_per_trial)
    reset_peak_memory()
    try:
        ground = Ground.of(start.config.base, load(data_folder))
        run_alone(start, paths, ground, listener, AtOnce(), lambda: (time.monotonic() - began) * gpus)
    except OrchestratorError as error:
        books.enter(Failed(0.0, 0.0, 0.0, error.message, error.remedy, None))


class _Here:
    """Keeps the books of a trial in this process, and lets a watcher follow."""

    def __init__(self, books: Books, watcher: Watcher, paths: TrialPaths) -> None:
        self.stopping = False
        self._books = books
        self._watcher = watcher
        self._paths = paths
        self._told: set[str] = set()
        self._tell_warnings()

    def on_step(self, step: int, total_steps: int) -> None:
        """See `Listener`."""
        self.stopping |= not self._watcher.on_step(step, total_steps)

    def emit(self, event: Event) -> None:
        """See `Listener`."""
        if isinstance(event, Left) and event.lost is not None:  # there is no other attempt
            event = Failed(
                event.seconds, event.gpu_seconds, event.peak_memory_gib, event.lost, f"Its log: {self._paths.log}", None
            )
        point = self._books.enter(event)
        self._tell_warnings()
        if point is not None:
            self.stopping |= not self._watcher.on_report(point)

    def _tell_warnings(self) -> None:
        for warning in self._books.warnings:
            if warning not in self._told:
                self._told.add(warning)
                self._watcher.say(f"warning: {warning}")
