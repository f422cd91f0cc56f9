"""Give trackers what they missed, from the records of trials that have ended."""

from collections import Counter
from collections.abc import Callable

from orchestrator.record import OPEN, SweepRecord, TrialResult, write_record
from orchestrator.tracking.fan_out import has_failed, open_tracker
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.tracking.secrets import reason
from orchestrator.words import counted


def catch_up(record: SweepRecord, say: Callable[[str], None]) -> None:
    """Send or write what trackers lack of a sweep whose trials have ended. One that was interrupted is left as it is.

    A tracker that fails again is not asked for further trials. Trials that ended while they were paused, or whose
    process was lost, are given to their trackers without a word.

    Args:
        record: a sweep whose trials are not being written by any other process.
        say: takes a sentence for whoever has started the sweep.
    """
    trials = record.trials()
    if any(trial.state in OPEN for trial in trials):
        return
    failed: dict[str, str] = {}
    sent, left = Counter[str](), Counter[str]()
    for trial in trials:
        lacking = [name for name in trial.untracked if not _send(record, trial, name, failed)]
        left.update(lacking)
        sent.update(name for name in trial.untracked if name not in lacking and has_failed(name, trial.warnings))
        if lacking != trial.untracked:
            paths = record.paths.trial(trial.trial_id)
            write_record(paths.result, trial.model_copy(update={"untracked": lacking}))
    for name, number in sent.items():
        say(f"{name} has been given the rest of {counted(number, 'trial')}")
    for name, number in left.items():
        again = f"`orchestrator resume {record.paths.root}` tries again"
        say(f"warning: {name} lacks {counted(number, 'trial')}: {failed[name]}; {again}")


def _send(record: SweepRecord, trial: TrialResult, name: str, failed: dict[str, str]) -> bool:
    """Give one tracker the whole of one trial; False where it has failed, now or before, as `failed` then says."""
    if name in failed:
        return False
    identity = TrialIdentity(record.paths.trial(trial.trial_id), trial, record.info.spec)
    try:
        open_tracker(name, identity).finish(trial)
    except Exception as error:  # whatever a third-party tracker raises: the results of the sweep stand without it
        failed[name] = reason(error)
    return name not in failed
