"""Sum up where a sweep stands: what it has used, and whether anything is left to run."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.errors import RecordError
from orchestrator.record.budget import BudgetSpent
from orchestrator.record.models import SweepInfo, TrialResult, TrialState
from orchestrator.record.paths import SweepPaths
from orchestrator.record.requests import unanswered
from orchestrator.record.search_ended import SearchEnded
from orchestrator.record.sweep_record import CHOOSABLE, OPEN, SweepRecord, read_sweep


@dataclass(frozen=True)
class Totals:
    """What trials have used together."""

    states: dict[TrialState, int]
    """Number of trials in each state."""
    tokens: int
    """Real tokens trained on. Tokens that a trial took over from another do not count again."""
    gpu_hours: float
    """GPU time, 0 on a CPU."""
    trial_hours: float
    """Wall-clock time of all trials, one after another."""

    @property
    def num_ended(self) -> int:
        """Trials that have ended."""
        return sum(number for state, number in self.states.items() if state not in OPEN)


def totals(trials: Sequence[TrialResult]) -> Totals:
    """Add up what trials have used."""
    return Totals(
        states=dict(Counter(trial.state for trial in trials)),
        tokens=sum(trial.tokens - trial.adopted_tokens for trial in trials),
        gpu_hours=sum(trial.gpu_seconds for trial in trials) / 3600,
        trial_hours=sum(trial.seconds for trial in trials) / 3600,
    )


def repeats_record(record: SweepRecord) -> SweepRecord | None:
    """Return the record of the finalists' repeats; None if they have not begun.

    Raises:
        RecordError: it is damaged.
    """
    paths = SweepPaths(record.paths.repeats)
    return read_sweep(paths.root) if paths.sweep.is_file() else None


def planned_trials(paths: SweepPaths, at_first: int) -> int:
    """Return how many trials a sweep is to have now; people may change that while it runs.

    Args:
        paths: of the sweep.
        at_first: the number while there is no record that can be read.
    """
    with suppress(RecordError, OSError):
        return read_sweep(paths.root).info.num_trials
    return at_first


def is_finished(record: SweepRecord, trials: Sequence[TrialResult] | None = None) -> bool:
    """Return whether a sweep has an adapter and nothing is left to run, measure or send to trackers.

    Args:
        record: the sweep.
        trials: its trials, if they have been read already.
    """
    if unanswered(record.paths):
        return False
    trials, spec = record.trials() if trials is None else trials, record.info.spec
    if not have_ended(record.info, trials, record.why_over()) or not any(trial.state in CHOOSABLE for trial in trials):
        return False
    if any(trial.untracked for trial in trials) or (spec.data.test is not None and not record.paths.test.is_file()):
        return False
    return have_repeats_ended(record, trials)


def have_repeats_ended(record: SweepRecord, trials: Sequence[TrialResult]) -> bool:
    """Return whether no finalist is left to run again, in a sweep whose own trials have ended.

    Args:
        record: the sweep.
        trials: its trials.

    Raises:
        RecordError: the record of the repeats is damaged.
    """
    if record.info.is_single_trial or record.info.spec.search.repeats < 2 or record.budget_spent():
        return True
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        return True  # a stopped trial is no finalist
    repeats = repeats_record(record)
    return repeats is not None and have_ended(repeats.info, repeats.trials(), repeats.why_over())


def have_ended(info: SweepInfo, trials: Sequence[TrialResult], why_over: BudgetSpent | SearchEnded | None) -> bool:
    """Return whether no trial of a sweep is left to run.

    Args:
        info: of the sweep.
        trials: all that have begun.
        why_over: `SweepRecord.why_over`.
    """
    if any(trial.state in OPEN for trial in trials):
        return False
    # Another trial takes a canceled one's place.
    num_ended = sum(trial.state != TrialState.CANCELLED for trial in trials)
    if num_ended >= info.num_trials or isinstance(why_over, BudgetSpent):
        return True
    # A sweep that ends itself still runs the trials that people have added.
    return why_over is not None and set(info.added) <= {trial.trial_id for trial in trials}
