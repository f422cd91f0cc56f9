"""Read a sweep back from its folder. What is on disk is authoritative; everything else is a view of it."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from orchestrator.errors import RecordError
from orchestrator.record.absent import require_present
from orchestrator.record.answers import Answers
from orchestrator.record.budget import BudgetSpent
from orchestrator.record.decisions import read_decisions
from orchestrator.record.files import write_atomic
from orchestrator.record.models import (
    AddedTrial,
    MetricPoint,
    Record,
    SweepInfo,
    TrialResult,
    TrialState,
    time_now,
)
from orchestrator.record.paths import SweepPaths, TrialPaths
from orchestrator.record.search_ended import SearchEnded
from orchestrator.record.test_score import TestScore
from orchestrator.spec import TrialConfig

_T = TypeVar("_T", SweepInfo, AddedTrial, TrialResult, TrialConfig, BudgetSpent, SearchEnded, TestScore, Answers)

# States of trials whose adapter may be chosen: a running trial can still improve, a failed one is not trusted.
CHOOSABLE = (TrialState.COMPLETE, TrialState.STOPPED)

OPEN = (TrialState.PENDING, TrialState.RUNNING, TrialState.PAUSED)
"""States of trials that have not ended."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, read from its folder."""

    paths: SweepPaths
    info: SweepInfo

    def trials(self) -> list[TrialResult]:
        """Return all trials, best first; those without an evaluation last."""
        return best_first([read_trial(self.paths.trial(trial_id), self.info) for trial_id in self.paths.trial_ids()])

    def finished(self) -> list[TrialResult]:
        """Return trials whose adapter may be chosen (COMPLETE or STOPPED, with an evaluation), best first."""
        return [trial for trial in self.trials() if trial.state in CHOOSABLE and trial.best]

    def budget_spent(self) -> BudgetSpent | None:
        """Return the limit that was reached, if one was; there may then be fewer trials than requested."""
        return _read(BudgetSpent, self.paths.budget) if self.paths.budget.is_file() else None

    def search_ended(self) -> SearchEnded | None:
        """Return why the sweep has ended itself, if it has; no further trial is then drawn."""
        return _read(SearchEnded, self.paths.search_ended) if self.paths.search_ended.is_file() else None

    def num_trials(self) -> int:
        """Return the number of trials of the sweep, unless its budget is spent before.

        Points that were dropped because they cannot fit into memory may leave fewer than were requested.
        """
        search = self.info.spec.search
        if self.info.is_single_trial or not search.skip_unfit:
            return self.info.num_trials
        num_dropped = sum(decision.action == "dropped" for decision in read_decisions(self.paths))
        num_left = search.num_points - num_dropped
        return int(min(search.total_trials, num_left)) + len(self.info.added)

    def why_over(self) -> BudgetSpent | SearchEnded | None:
        """Return why no further trial begins, if that is so; there may then be fewer trials than requested."""
        return self.budget_spent() or self.search_ended()

    def test_score(self) -> TestScore | None:
        """Return the winner's scores on the test rows, if they were measured."""
        return _read(TestScore, self.paths.test) if self.paths.test.is_file() else None

    def answers(self) -> Answers | None:
        """Return answers of the base and of the recommended adapter, if they were recorded."""
        return _read(Answers, self.paths.answers) if self.paths.answers.is_file() else None

    def adapter_path(self, trial: TrialResult) -> Path:
        """Return where the adapter of a trial's best evaluation should be."""
        assert trial.best is not None
        return self.paths.trial(trial.trial_id).root / trial.best.adapter

    def adapter(self, trial: TrialResult) -> Path:
        """Return the folder of the adapter of a trial's best evaluation.

        Raises:
            AbsentError: `orchestrator clean` has removed it.
            RecordError: it is missing, or the record or a symbolic link leads out of the sweep's folder.
        """
        require_present(self.paths, trial.trial_id)
        folder = self.adapter_path(trial)
        if not folder.is_dir():
            raise RecordError(f"{folder}: the adapter of trial {trial.trial_id} is missing")
        if folder.resolve() != self.paths.root.resolve() / folder.relative_to(self.paths.root):
            raise RecordError(
                f"{folder}: the adapter of trial {trial.trial_id} is outside the sweep: its path leads to "
                f"{folder.resolve()}",
                "Put the folder itself in its place; symbolic links in a sweep are not followed.",
            )
        return folder


def read_sweep(sweep: str | Path, output: str | Path = "runs") -> SweepRecord:
    """Open a sweep by its folder, or by its name under `output`.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
    """
    for root in (Path(sweep), Path(output) / sweep):
        try:
            paths = SweepPaths(root.resolve())
            found = paths.sweep.is_file()
        except (OSError, ValueError) as error:  # a name that is too long for a path, or has a null byte
            raise RecordError(f"{sweep!s:.80}: is not the name of a sweep: {error}") from error
        if found:
            return SweepRecord(paths, _read(SweepInfo, paths.sweep))
    if Path(sweep).suffix in (".yaml", ".yml"):
        raise RecordError(f"{sweep}: is an experiment file, not a sweep", "Give the folder of a sweep, or its name.")
    raise RecordError(
        f"{sweep}: there is no such sweep (no sweep.json in {sweep} or {Path(output) / sweep})",
        "Give the sweep's folder, or its name together with --output.",
    )


def best_first(trials: Iterable[TrialResult]) -> list[TrialResult]:
    """Sort trials by their best evaluations; those without an evaluation come last."""
    return sorted(
        trials, key=lambda r: (r.best is None, (r.best.value if r.mode == "min" else -r.best.value) if r.best else 0.0)
    )


def read_trial(paths: TrialPaths, info: SweepInfo) -> TrialResult:
    """Return one trial: its result, or its progress, or PENDING with its configuration."""
    for path in (paths.result, paths.progress):
        if path.is_file():
            trial = _read(TrialResult, path)
            is_paused = trial.state == TrialState.RUNNING and paths.paused.is_file()
            return trial.model_copy(update={"state": TrialState.PAUSED}) if is_paused else trial
    search = info.spec.search
    return TrialResult(
        trial_id=paths.trial_id,
        state=TrialState.PENDING,
        config=_read(TrialConfig, paths.config),
        metric=search.metric,
        mode=search.resolved_mode,
    )


def read_result(paths: TrialPaths) -> TrialResult:
    """Return the result of a trial that has ended."""
    return _read(TrialResult, paths.result)


def read_added(paths: TrialPaths) -> AddedTrial | None:
    """Return how a trial was added by a request; None for a trial of the search."""
    return _read(AddedTrial, paths.added) if paths.added.is_file() else None


def read_metrics(paths: TrialPaths) -> list[MetricPoint]:
    """Return every point of a trial in order. A line that a crash cut short is left out."""
    if not paths.metrics.is_file():
        return []
    lines = paths.metrics.read_text(encoding="utf-8").split("\n")
    # Each point is one write that ends with a line break, so only the text after the last one can be incomplete.
    try:
        return [MetricPoint.model_validate_json(line) for line in lines[:-1]]
    except ValidationError as error:
        raise RecordError(f"{paths.metrics}: the record is damaged: {error}") from error


def resumable(paths: TrialPaths, config: TrialConfig) -> TrialResult | None:
    """Return a trial as it was at its last complete checkpoint; None if it must start from the beginning.

    Step and tokens are those of the checkpoint: what was done after it will be done again. The best adapter may be
    from a later step: it is complete, and will be measured again with the same value.
    """
    if not paths.progress.is_file():
        return None
    progress = _read(TrialResult, paths.progress)
    if progress.config != config or progress.checkpoint is None or not (paths.root / progress.checkpoint).is_dir():
        return None
    step = int(progress.checkpoint.rpartition("-")[2])
    if progress.step == step:
        return progress
    points = [point for point in read_metrics(paths) if point.step <= step]
    return progress.model_copy(update={"step": step, "tokens": points[-1].tokens if points else 0})


def end_trial(paths: TrialPaths, result: TrialResult) -> TrialResult:
    """Write the final result of a trial, and remove its checkpoints."""
    result = result.model_copy(update={"checkpoint": None, "ended": time_now()})
    write_record(paths.result, result)
    shutil.rmtree(paths.checkpoints, ignore_errors=True)
    return result


def write_record(path: Path, record: Record | TrialConfig) -> None:
    """Write a record in one atomic step."""
    write_atomic(path, record.model_dump_json(indent=2) + "\n")


def _read(model: type[_T], path: Path) -> _T:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: the record is damaged or of another version: {error}") from error
