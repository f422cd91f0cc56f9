"""How a sweep ends once Tune has no more trials to run: with results, interrupted, or without any result."""

from typing import NoReturn

from orchestrator.errors import Interrupted, SweepError
from orchestrator.record import OPEN, SweepPaths, SweepRecord, TrialResult, TrialState
from orchestrator.record.sweep_record import CHOOSABLE
from orchestrator.words import counted


def conclude(record: SweepRecord, home: SweepPaths, failures_count: bool = False) -> None:
    """Raise if the sweep has not come to its end, or if no trial has finished.

    Args:
        record: the sweep's record, or that of its repeats or of an audit.
        home: the sweep's own paths, which a resume is given.
        failures_count: whether a trial that has failed by its own values is a result too, as in an audit.

    Raises:
        Interrupted: trials are left to run.
        SweepError: no trial finished.
    """
    trials = record.trials()
    is_over = record.why_over() and all(trial.state not in OPEN for trial in trials)
    if len(ended(trials)) < record.num_trials() and not is_over:
        raise_interrupted(record, home, "before its end")
    if not any(
        trial.state in CHOOSABLE or (failures_count and trial.failure not in (None, "infrastructure"))
        for trial in trials
    ):
        first = next((trial for trial in trials if trial.error), None)
        if first is None:
            remedy = f"Raise it with: orchestrator resume {home.root} --budget LIMIT=V"
            raise SweepError("the budget was spent before a trial finished", remedy)
        log = record.paths.trial(first.trial_id).log
        raise SweepError(
            f"all of {counted(len(trials), 'trial')} failed; the first one: {first.error}",
            f"Its log: {log}" if log.is_file() else f"The workers' logs: {record.paths.workers}",
        )


def ended(trials: list[TrialResult]) -> list[TrialResult]:
    """Return the trials that have a result of their own."""
    return [trial for trial in trials if trial.state in (*CHOOSABLE, TrialState.FAILED)]


def raise_interrupted(
    record: SweepRecord, home: SweepPaths, how: str, exit_code: int = Interrupted.exit_code
) -> NoReturn:
    """Raise `Interrupted` with how far the sweep has come and how to continue.

    Args:
        record: the sweep's record, or that of its repeats or of an audit.
        home: the sweep's own paths, which a resume is given.
        how: by what, such as `by Ctrl-C`.
        exit_code: of the command.
    """
    trials = record.trials()
    num_ended, total = len(ended(trials)), record.num_trials() if record.search_ended() is None else len(trials)
    raise Interrupted(
        f"interrupted {how} with {num_ended} of {counted(total, 'trial')} ended; the others can continue from their "
        "last steps",
        f"Continue with: orchestrator resume {home.root}",
        exit_code,
    )
