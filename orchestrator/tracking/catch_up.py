"""Send to trackers what they missed, from the records of trials that have ended."""

from collections import Counter
from collections.abc import Callable

from orchestrator.record import OPEN, SweepRecord, TrialResult, write_record
from orchestrator.tracking.fan_out import has_failed, open_tracker
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.tracking.secrets import reason
from orchestrator.words import counted


def catch_up(record: SweepRecord, say: Callable[[str], None]) -> None:
    """Complete the trackers of a sweep whose trials have all ended. An interrupted sweep is left unchanged.

    A tracker that fails again is not tried for further trials. Nothing is said about trials whose trackers did not
    fail, for example because the trial ended while it was paused, or because its process was lost.

    Args:
        record: a sweep; no other process may be writing its trials.
        say: prints a message to the user.
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
        say(f"{name} has received the missing records of {counted(number, 'trial')}")
    for name, number in left.items():
        again = f"`orchestrator resume {record.paths.root}` tries again"
        say(f"warning: {name} is missing records of {counted(number, 'trial')}: {failed[name]}; {again}")


def _send(record: SweepRecord, trial: TrialResult, name: str, failed: dict[str, str]) -> bool:
    """Send all records of one trial to one tracker.

    Args:
        record: the sweep.
        trial: the trial.
        name: the tracker's name.
        failed: tracker -> why it failed; a failure of this call is added.

    Returns:
        False if the tracker fails, or failed in an earlier call.
    """
    if name in failed:
        return False
    identity = TrialIdentity(record.paths.trial(trial.trial_id), trial, record.info.spec)
    try:
        open_tracker(name, identity).finish(trial)
    except Exception as error:  # a third-party tracker may raise anything; the sweep's results do not depend on it
        failed[name] = reason(error)
    return name not in failed
