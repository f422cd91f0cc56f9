"""Tell whether a sweep waits for people: all trials that are left are paused by request."""

from collections.abc import Sequence

from orchestrator.record.models import TrialResult, TrialState
from orchestrator.record.sweep_record import OPEN, SweepRecord
from orchestrator.words import counted


def only_paused(record: SweepRecord, trials: Sequence[TrialResult]) -> list[str]:
    """Return the trials that are left, if somebody has paused all of them; otherwise an empty list.

    Args:
        record: the sweep.
        trials: all that have begun.
    """
    begun = {trial.trial_id for trial in trials}
    waiting = [name for name in record.info.added if name not in begun]
    left = [trial for trial in trials if trial.state in OPEN]
    names = [trial.trial_id for trial in left] + waiting
    num_ended = sum(trial.state not in (*OPEN, TrialState.CANCELLED) for trial in trials)
    if num_ended + len(names) < record.info.num_trials and record.why_over() is None:
        return []  # the search draws more trials
    are_held = all(record.paths.trial(name).held.is_file() for name in names)
    return names if are_held and all(trial.state == TrialState.PAUSED for trial in left) else []


def say_only_paused(record: SweepRecord, names: Sequence[str]) -> str:
    """Return a sentence that only these paused trials are left, and what has them go on."""
    return (
        f"only {counted(len(names), 'paused trial')} left: {', '.join(names)}; have them go on with: "
        f"orchestrator go-on {record.paths.root}/{names[0]}"
    )
