"""Find damaged records of a sweep, and repair what other files still tell.

Readers pass a damaged record over and go on with the others. Views name what is found here; `resume` repairs it first.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from orchestrator.record.absent import AbsentAdapters
from orchestrator.record.answers import Answers
from orchestrator.record.budget import BudgetSpent
from orchestrator.record.checked import DamagedError, read_lines, read_record, write_record
from orchestrator.record.decisions import Decision
from orchestrator.record.faults import Fault, append_fault
from orchestrator.record.models import AddedTrial, MetricPoint, SweepInfo, TrialResult
from orchestrator.record.paths import SweepPaths, TrialPaths
from orchestrator.record.search_ended import SearchEnded
from orchestrator.record.sweep_record import OPEN, SweepRecord, read_own, read_sweep, read_trial, write_info
from orchestrator.record.test_score import TestScore
from orchestrator.spec import TrialConfig

_SET_ASIDE = ".damaged-"
"""Name prefix of a damaged record that is kept out of the way."""


@dataclass(frozen=True)
class Damage:
    """A damaged record, and what becomes of it."""

    path: Path
    fault: str
    """The file and what is wrong with it."""
    then: str
    """What `resume` does about it, or what is lost."""
    trial_id: str | None = None
    """Trial whose record it is; None for one of the sweep."""
    repair: Callable[[], object] | None = None
    """Repairs it; None if there is nothing to do."""

    def __str__(self) -> str:
        return f"{self.fault}; {self.then}"


def find_damage(record: SweepRecord) -> list[Damage]:
    """Return the damaged records of a sweep and of its repeats. Nothing is written.

    Raises:
        OSError: the storage fails.
    """
    paths, info = record.paths, record.info
    found = list(_damage_of_sweep(paths, info))
    for trial_id in paths.trial_ids():
        found += _damage_of_trial(paths.trial(trial_id), info)
    repeats = SweepPaths(paths.repeats)
    if repeats.sweep.is_file():
        found += find_damage(read_sweep(repeats.root))
    return found


def repair(record: SweepRecord) -> list[Damage]:
    """Repair the damaged records of a sweep, and log each in `faults.jsonl`. The caller must be the only driver.

    Returns:
        All that was found, repaired or not.
    """
    found = find_damage(record)
    for damage in found:
        if damage.repair is not None:
            damage.repair()
            append_fault(record.paths, Fault(trial_id=damage.trial_id, cause=damage.fault, then=damage.then))
    return found


def _damage_of_sweep(paths: SweepPaths, info: SweepInfo) -> Iterator[Damage]:
    for path in (paths.sweep, paths.sweep_copy):
        if fault := _fault(SweepInfo, path):
            yield Damage(path, fault, "`resume` writes it anew from its copy", repair=partial(write_info, paths, info))
    again: list[tuple[type[BaseModel], Path, str]] = [
        (BudgetSpent, paths.budget, "`resume` finds out anew whether the budget is spent"),
        (SearchEnded, paths.search_ended, "`resume` finds out anew whether the search has ended"),
        (TestScore, paths.test, "`resume` measures the test rows again"),
        (Answers, paths.answers, "the recorded answers are lost; the adapters are not"),
    ]
    for model, path, then in again:
        if fault := _fault(model, path):
            yield Damage(path, fault, then, repair=partial(_set_aside, path))
    if fault := _fault(AbsentAdapters, paths.absent):
        yield Damage(paths.absent, fault, "adapters that `clean` has removed count as missing")
    decisions = read_lines(Decision, paths.decisions)
    if decisions.fault and not decisions.is_cut:
        fault = f"{paths.decisions}: is damaged: {decisions.fault}"
        yield Damage(paths.decisions, fault, "views lack that decision; no result depends on it")


def _damage_of_trial(paths: TrialPaths, info: SweepInfo) -> Iterator[Damage]:
    damaged = partial(Damage, trial_id=paths.trial_id)
    trial, result_fault = None, None
    try:
        trial = read_own(paths, paths.result)
    except FileNotFoundError:
        pass
    except DamagedError as error:
        result_fault = error.message
    if trial is None:
        with suppress(DamagedError):
            trial = read_trial(paths, info)
    has_ended = trial is not None and trial.state not in OPEN
    if fault := _fault(TrialConfig, paths.config):
        if trial is not None:
            then = "`resume` writes it anew from the trial's other records"
            yield damaged(paths.config, fault, then, repair=partial(write_record, paths.config, trial.config))
        else:
            then = "the trial is left out of all views; `resume` runs it anew if the search knows it"
            yield damaged(paths.config, fault, then, repair=partial(_set_aside, paths.config))
    if result_fault:
        if trial is not None and has_ended:
            then = "`resume` writes it anew from progress.json, which holds the result too"
            yield damaged(paths.result, result_fault, then, repair=partial(write_record, paths.result, trial))
        else:
            then = "`resume` continues the trial from its last whole checkpoint, or runs it anew"
            yield damaged(paths.result, result_fault, then, repair=partial(_set_aside, paths.result))
    if fault := _fault_by(partial(read_own, paths, paths.progress)):
        if trial is not None and not result_fault:
            then = "`resume` writes it anew from the trial's other files"
            yield damaged(paths.progress, fault, then, repair=partial(write_record, paths.progress, trial))
        else:
            then = "`resume` runs the trial anew"
            yield damaged(paths.progress, fault, then, repair=partial(_set_aside, paths.progress))
    if fault := _fault(AddedTrial, paths.added):
        then = "who has asked for the trial is lost; its values are not"
        yield damaged(paths.added, fault, then, repair=partial(_set_aside, paths.added))
    if trial is not None and (lost := _lost_points(paths, trial, has_ended)):
        then = "its curve has a gap" if has_ended else "`resume` goes back to a checkpoint before it"
        yield damaged(paths.metrics, f"{paths.metrics}: is damaged: {lost}", then)


def _lost_points(paths: TrialPaths, trial: TrialResult, has_ended: bool) -> str | None:
    """Return which points of a trial are lost. While a trial is open, its last line may be incomplete."""
    points = read_lines(MetricPoint, paths.metrics)
    if points.fault and (has_ended or not points.is_cut):
        return points.fault
    last = points.records[-1].step if points.records else 0
    if has_ended and trial.parent is None and last < trial.step:
        return f"it ends at step {last}, the trial at step {trial.step}"
    return None


def _fault(model: type[BaseModel], path: Path) -> str | None:
    """Return the file and what is wrong with it; None if it is whole or absent."""
    return _fault_by(partial(read_record, model, path))


def _fault_by(read: Callable[[], object]) -> str | None:
    """Return what is wrong with a record by the error of its reader; None if there is none, or no file."""
    try:
        read()
    except FileNotFoundError:
        return None
    except DamagedError as error:
        return error.message
    return None


def _set_aside(path: Path) -> None:
    path.rename(path.with_name(_SET_ASIDE + path.name))
