"""Read all records of a sweep. What is damaged is left out and named, so that the rest can still be analyzed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from orchestrator.deploy import ChosenTrial, FinishedSweep
from orchestrator.errors import OrchestratorError, RecordError
from orchestrator.record import (
    Answers,
    BudgetSpent,
    Decision,
    MetricPoint,
    SearchEnded,
    SweepInfo,
    SweepPaths,
    SweepRecord,
    TestScore,
    TrialResult,
    TrialState,
    have_ended,
    have_repeats_ended,
    read_decisions,
    read_metrics,
    read_sweep,
    read_trial,
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class SweepData:
    """Everything that could be read of a sweep."""

    record: SweepRecord
    trials: list[TrialResult]
    """Best first; trials without a finite value come last."""
    points: dict[str, list[MetricPoint]]
    """Trial id -> its metric points, in order."""
    decisions: list[Decision]
    repeats: list[TrialResult]
    """Runs of the finalists with other seeds."""
    choice: ChosenTrial | None
    """The recommended trial, and the comparison by which it was chosen."""
    why_no_choice: str
    """Why there is no recommended trial; empty if there is one."""
    why_over: BudgetSpent | SearchEnded | None
    have_repeats_ended: bool
    """Whether no finalist is left to run again."""
    test_score: TestScore | None
    answers: Answers | None
    """Answers of the base and of a recommended adapter to held-out prompts."""
    damaged: list[str] = field(default_factory=list)
    """What could not be read, one message for each file."""
    title: str = ""
    """Name among several sweeps, if another one has a folder of the same name."""

    @property
    def info(self) -> SweepInfo:
        """What was known of the sweep before its first trial."""
        return self.record.info

    @property
    def name(self) -> str:
        """Name of the sweep's folder, or the title."""
        return self.title or self.record.paths.name

    @property
    def metric(self) -> str:
        """The search metric."""
        return self.info.spec.search.metric

    @property
    def sign(self) -> int:
        """1 if lower values of the metric are better, else -1."""
        return 1 if self.info.spec.search.resolved_mode == "min" else -1

    @property
    def leader(self) -> TrialResult | None:
        """The finished trial with the best value; None if none has finished."""
        if self.choice is not None:
            return self.choice.recommendation.leader.trial
        ended = (TrialState.COMPLETE, TrialState.STOPPED)
        return next((trial for trial in self.trials if trial.state in ended and value_of(trial) is not None), None)

    @property
    def over_seeds(self) -> dict[str, list[float]]:
        """Finalist -> values of its runs with different seeds; empty if none ran again."""
        return self.choice.recommendation.over_seeds if self.choice else {}

    @property
    def is_over(self) -> bool:
        """Whether no trial of the sweep is left to run, nor one of the finalists again."""
        return have_ended(self.info, self.trials, self.why_over) and self.have_repeats_ended

    def fields(self) -> list[str]:
        """Return the searched fields; tied ones follow from them. A single trial searches none."""
        return [] if self.info.is_single_trial else list(self.info.spec.search.space)

    def evaluations(self, trial_id: str, metric: str) -> list[MetricPoint]:
        """Return the points of a trial that hold a finite value of a metric, one for each step."""
        by_step = {
            point.step: point
            for point in self.points.get(trial_id, [])
            if math.isfinite(point.values.get(metric, math.nan))
        }
        return [by_step[step] for step in sorted(by_step)]


def value_of(trial: TrialResult) -> float | None:
    """Return the best value of the search metric; None if there is none or it is not finite."""
    return trial.best.value if trial.best and math.isfinite(trial.best.value) else None


def read_data(record: SweepRecord) -> SweepData:
    """Read all records of a sweep."""
    damaged: list[str] = []
    trials = _read_trials(record, damaged)
    points = {}
    for trial in trials:
        paths = record.paths.trial(trial.trial_id)
        points[trial.trial_id] = _attempt(partial(read_metrics, paths), [], damaged, paths.metrics)
    decisions = _attempt(lambda: read_decisions(record.paths), [], damaged, record.paths.decisions)
    choice, why = _choose(record, damaged)
    return SweepData(
        record=record,
        trials=trials,
        points=points,
        decisions=decisions,
        repeats=_read_repeats(record, damaged),
        choice=choice,
        why_no_choice=why,
        why_over=_attempt(record.why_over, None, damaged),
        have_repeats_ended=_attempt(lambda: have_repeats_ended(record, trials), True, damaged),
        test_score=_attempt(record.test_score, None, damaged),
        answers=_attempt(record.answers, None, damaged),
        damaged=damaged,
    )


def with_distinct_names(sweeps: Sequence[SweepData]) -> list[SweepData]:
    """Return the sweeps; if two have one name, all are named with their parent folders, or else with their places."""
    names = [data.name for data in sweeps]
    if len(set(names)) < len(names):
        names = [f"{data.record.paths.root.parent.name}/{data.name}" for data in sweeps]
    if len(set(names)) < len(names):
        names = [f"{name}-{place}" for place, name in enumerate(names, 1)]
    return [replace(data, title=name) for data, name in zip(sweeps, names, strict=True)]


def _read_trials(record: SweepRecord, damaged: list[str]) -> list[TrialResult]:
    trials = []
    for trial_id in record.paths.trial_ids():
        trial = _attempt(lambda t=trial_id: read_trial(record.paths.trial(t), record.info), None, damaged)  # type: ignore[misc]
        if trial is not None:
            trials.append(trial)
    sign = 1 if record.info.spec.search.resolved_mode == "min" else -1

    def place(trial: TrialResult) -> float:
        value = value_of(trial)
        return math.inf if value is None else sign * value

    return sorted(trials, key=place)


def _read_repeats(record: SweepRecord, damaged: list[str]) -> list[TrialResult]:
    paths = SweepPaths(record.paths.repeats)
    if not paths.sweep.is_file():
        return []
    repeats = _attempt(lambda: read_sweep(paths.root), None, damaged)
    return [] if repeats is None else _read_trials(repeats, damaged)


def _choose(record: SweepRecord, damaged: list[str]) -> tuple[ChosenTrial | None, str]:
    """Return the recommended trial, or why there is none."""
    try:
        choice = FinishedSweep(record).best()
    except OrchestratorError as error:
        return None, error.message
    except ValidationError as error:
        return None, f"a record is damaged: {error}"
    value = value_of(choice.recommendation.leader.trial)
    if value is None:
        return None, "the best value is not finite"
    damaged.extend(f"trial {trial_id}: {fault}" for trial_id, fault in choice.damaged.items())
    return choice, ""


def _attempt(read: Callable[[], _T], otherwise: Any, damaged: list[str], path: Path | None = None) -> _T:
    """Return what `read` returns; note a damaged record and return `otherwise`."""
    try:
        return read()
    except RecordError as error:
        damaged.append(error.message)
    except (ValidationError, UnicodeDecodeError) as error:
        damaged.append(f"{path or 'a record'}: the record is damaged: {error}")
    result: _T = otherwise
    return result
