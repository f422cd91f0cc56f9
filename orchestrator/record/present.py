"""Read the trials of a running sweep, with the steps that they have made by now."""

from contextlib import suppress

from orchestrator.record.checked import DamagedError
from orchestrator.record.models import MetricPoint, TrialResult, TrialState
from orchestrator.record.paths import TrialPaths
from orchestrator.record.standing import repeats_record
from orchestrator.record.sweep_record import SweepRecord, best_first, read_trial

_TAIL = 8192
"""Bytes at the end of the metrics in which the last point is looked for."""


class PresentTrials:
    """Reads the trials of a sweep again and again. A trial that has ended is read once."""

    def __init__(self, record: SweepRecord) -> None:
        """
        Args:
            record: the sweep.
        """
        self._record = record
        self._ended: dict[str, tuple[int, TrialResult]] = {}
        """Trials that have ended, with the times at which their results were written, in nanoseconds."""
        self._repeats: PresentTrials | None = None

    def read(self) -> list[TrialResult]:
        """Return all trials, best first. Running ones have the steps, tokens and training loss of this moment.

        Trials of which too little is left are missing; `record.damage` names them.

        Raises:
            OSError: the storage fails.
        """
        trials = []
        for trial_id in self._record.paths.trial_ids():
            with suppress(DamagedError):
                trials.append(self._read(trial_id))
        return best_first(trials)

    def repeats(self) -> list[TrialResult]:
        """Return the runs of the finalists with other seeds, likewise; empty until they begin."""
        if self._repeats is None:
            found = repeats_record(self._record)
            self._repeats = None if found is None else PresentTrials(found)
        return self._repeats.read() if self._repeats else []

    def _read(self, trial_id: str) -> TrialResult:
        paths = self._record.paths.trial(trial_id)
        try:
            written = paths.result.stat().st_mtime_ns
        except FileNotFoundError:
            return _at_this_moment(read_trial(paths, self._record.info), paths)
        known = self._ended.get(trial_id)
        if known is None or known[0] != written:
            known = self._ended[trial_id] = written, read_trial(paths, self._record.info)
        return known[1]


def _at_this_moment(trial: TrialResult, paths: TrialPaths) -> TrialResult:
    """Return a running trial with the values of its last logged steps, which `progress.json` has not yet."""
    if trial.state not in (TrialState.RUNNING, TrialState.PAUSED):
        return trial
    point = _last_point(paths)
    if point is not None and point.step > trial.step:
        loss = point.values.get("train/loss", trial.train_loss)
        update = {"step": point.step, "tokens": max(trial.tokens, point.tokens), "train_loss": loss}
        trial = trial.model_copy(update=update)
    with suppress(OSError, ValueError):  # there is none, or it is being written
        trial = trial.model_copy(update={"step": max(trial.step, int(paths.step.read_text()))})
    return trial


def _last_point(paths: TrialPaths) -> MetricPoint | None:
    """Return the last complete line of a trial's metrics; None if there is none yet, or if it is damaged."""
    try:
        with paths.metrics.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(end - _TAIL, 0))
            lines = file.read().split(b"\n")[:-1]
        return MetricPoint.model_validate_json(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
