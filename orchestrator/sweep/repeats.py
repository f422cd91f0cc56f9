"""Run the finalists of a sweep again with other seeds: a small sweep of its own, in the folder `repeats`."""

from orchestrator.deploy import FinishedSweep
from orchestrator.record import SweepRecord, TrialResult, TrialState
from orchestrator.spec import SweepSpec
from orchestrator.spec.search import SEED
from orchestrator.sweep.reruns import begin_rerun, point_of, rerun_spec

MAX_FINALISTS = 4


def begin_repeats(record: SweepRecord) -> SweepRecord | None:
    """Return the record of the repeats, made now or by an earlier driver; None if no trial has run to its end.

    Repeats of other finalists, from before the sweep was given more trials, are replaced.

    Raises:
        RecordError: no trial of the sweep has finished with an adapter.
    """
    trials = finalists(record)
    if not trials:
        return None
    return begin_rerun(record, record.paths.repeats, repeats_of(record.info.spec, trials))


def finalists(record: SweepRecord) -> list[TrialResult]:
    """Return the best trial and those that cannot be told apart from it on the held-out rows, best first.

    There are at least two, where two trials have scores of these rows: the lead over the second may be that of a seed.
    A trial that was stopped is no finalist: its run of fewer steps says nothing about whole runs with other seeds.

    Raises:
        RecordError: no trial of the sweep has finished with an adapter.
    """
    choice = FinishedSweep(record, uses_repeats=False).best(strict=True).recommendation
    tied = [choice.leader, *(rival.candidate for rival in choice.tied)]
    others = [rival.candidate for rival in choice.rivals if not rival.is_tied]
    ranked = [each.trial for each in (*tied, *others) if each.trial.state == TrialState.COMPLETE]
    num_tied = sum(each.trial.state == TrialState.COMPLETE for each in tied)
    return ranked[: min(max(num_tied, 2), MAX_FINALISTS)]


def repeats_of(spec: SweepSpec, trials: list[TrialResult]) -> SweepSpec:
    """Return the experiment that runs these trials again with other seeds. No scheduler stops them, nor a budget."""
    seeds = [spec.training.seed + i for i in range(1, spec.search.repeats)]
    points = [point_of(trial, spec) | {SEED: seed} for trial in trials for seed in seeds]
    return rerun_spec(spec, points, {SEED: {"choice": seeds}})
