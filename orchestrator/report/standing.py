"""Say in words where a sweep stands: alive or dead, and what it has used."""

from collections.abc import Sequence

from orchestrator.record import SweepRecord, TrialResult, is_finished, totals
from orchestrator.record.lock import DriverState, driver_state
from orchestrator.report.tables import duration


def standing_lines(record: SweepRecord, trials: Sequence[TrialResult]) -> list[str]:
    """Return the totals of a sweep, and whether it runs, is finished, or waits for a resume."""
    used = totals(trials)
    states = ", ".join(f"{number} {state}" for state, number in used.states.items())
    gpu = f", {used.gpu_hours:.3g} GPU-hours" if used.gpu_hours else ""
    return [
        f"{used.num_ended} of {record.info.num_trials} trials ended ({states or 'none has begun'}), "
        f"{used.tokens:,} tokens{gpu}, {duration(used.trial_hours * 3600)} of work",
        standing(record, trials, driver_state(record.paths)),
    ]


def standing(record: SweepRecord, trials: Sequence[TrialResult], driver: DriverState) -> str:
    """Return one sentence on whether a sweep runs; if it does not and is not finished, how to resume it."""
    if driver.is_running:
        where = f" on {driver.driver.host} (process {driver.driver.pid})" if driver.driver else ""
        return f"running{where}, last sign {duration(driver.silent_s)} ago"
    if is_finished(record, trials):
        return "finished"
    return (
        f"no driver is running, last sign {duration(driver.silent_s)} ago; "
        f"resume with: orchestrator resume {record.paths.root}"
    )
