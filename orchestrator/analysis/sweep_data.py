"""Read all records of a sweep. What is damaged is left out and named, so that the rest can still be analyzed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.deploy import ChosenTrial, FinishedSweep
from orchestrator.errors import OrchestratorError
from orchestrator.record import (
    Answers,
    BudgetSpent,
    Decision,
    MetricPoint,
    SearchEnded,
    SweepInfo,
    SweepRecord,
    TestScore,
    TrialResult,
    TrialState,
    find_damage,
    have_ended,
    have_repeats_ended,
    read_decisions,
    read_metrics,
    read_trials,
    repeats_record,
)


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
    """What is damaged, one message for each file."""
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
    damaged = [str(damage) for damage in find_damage(record)]
    trials = _read_trials(record)
    choice, why = _choose(record, damaged)
    return SweepData(
        record=record,
        trials=trials,
        points={trial.trial_id: read_metrics(record.paths.trial(trial.trial_id)) for trial in trials},
        decisions=read_decisions(record.paths),
        repeats=_read_repeats(record),
        choice=choice,
        why_no_choice=why,
        why_over=record.why_over(),
        have_repeats_ended=have_repeats_ended(record, trials),
        test_score=record.test_score(),
        answers=record.answers(),
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


def _read_trials(record: SweepRecord) -> list[TrialResult]:
    sign = 1 if record.info.spec.search.resolved_mode == "min" else -1

    def place(trial: TrialResult) -> float:
        value = value_of(trial)
        return math.inf if value is None else sign * value

    return sorted(read_trials(record.paths, record.info), key=place)


def _read_repeats(record: SweepRecord) -> list[TrialResult]:
    repeats = repeats_record(record)
    return [] if repeats is None else _read_trials(repeats)


def _choose(record: SweepRecord, damaged: list[str]) -> tuple[ChosenTrial | None, str]:
    """Return the recommended trial, or why there is none."""
    try:
        choice = FinishedSweep(record).best()
    except OrchestratorError as error:
        return None, error.message
    value = value_of(choice.recommendation.leader.trial)
    if value is None:
        return None, "the best value is not finite"
    damaged.extend(f"trial {trial_id}: {fault}" for trial_id, fault in choice.damaged.items())
    return choice, ""
