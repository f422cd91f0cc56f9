"""Say in words where a sweep stands: alive or dead, and what it has used."""

from collections.abc import Sequence

from orchestrator.record import SweepRecord, TrialResult, is_finished, repeats_record, totals
from orchestrator.record.held import only_paused, say_only_paused
from orchestrator.record.lock import DriverState, driver_state
from orchestrator.report.tables import duration
from orchestrator.words import counted


def standing_lines(
    record: SweepRecord, trials: Sequence[TrialResult], repeats: Sequence[TrialResult] = ()
) -> list[str]:
    """Return the totals of a sweep, and whether it runs, is finished, or waits for a resume.

    Args:
        record: the sweep.
        trials: those that have begun.
        repeats: runs of its finalists with other seeds that have begun.
    """
    lines = [_used(trials, record.num_trials())]
    if repeats:
        found = repeats_record(record)
        planned = found.info.num_trials if found else len(repeats)
        lines.append(f"the finalists again, with other seeds: {_used(repeats, planned)}")
    return [*lines, standing(record, trials, driver_state(record.paths))]


def _used(trials: Sequence[TrialResult], planned: int) -> str:
    used = totals(trials)
    states = ", ".join(f"{number} {state}" for state, number in used.states.items())
    gpu = f", {used.gpu_hours:.3g} GPU-hours" if used.gpu_hours else ""
    return (
        f"{used.num_ended} of {counted(planned, 'trial')} ended ({states or 'none has begun'}), "
        f"{used.tokens:,} tokens{gpu}, {duration(used.trial_hours * 3600)} of work"
    )


def standing(record: SweepRecord, trials: Sequence[TrialResult], driver: DriverState) -> str:
    """Return one sentence on whether a sweep runs; if it does not and is not finished, how to resume it."""
    if driver.is_running:
        where = f" on {driver.driver.host} (process {driver.driver.pid})" if driver.driver else ""
        names = only_paused(record, trials)
        waits = f"; {say_only_paused(record, names)}" if names else ""
        return f"running{where}, last sign {duration(driver.silent_s)} ago{waits}"
    if is_finished(record, trials):
        return "finished"
    return (
        f"no driver is running, last sign {duration(driver.silent_s)} ago; "
        f"resume with: orchestrator resume {record.paths.root}"
    )
