"""The table of a sweep's trials: the winner is marked, and each difference says over what it was compared."""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from orchestrator.analysis.sweep_data import SweepData, value_of
from orchestrator.analysis.wording import say_number
from orchestrator.deploy.recommend import CONFIDENCE, ComparedCandidate
from orchestrator.record import TrialResult, TrialState
from orchestrator.report.tables import duration
from orchestrator.spec.sections.evaluation import STDERR
from orchestrator.words import counted

_LAST = 1e300
"""Sort key of cells without a number, which come last."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    key: float | str
    """Sort key within its column."""


@dataclass(frozen=True)
class Table:
    """A table with a head."""

    columns: list[str]
    rows: list[list[Cell]]
    is_number: list[bool] = field(default_factory=list)
    """For each column, whether it holds numbers."""
    marked: int | None = None
    """Index of the row to highlight."""


def trials_table(data: SweepData) -> Table:
    """Return a row for each trial, best value first; searched values come before what describes the run."""
    fields = list(dict.fromkeys(name for trial in data.trials for name in trial.config.varied))
    metrics = dict.fromkeys(name for t in data.trials if t.best for name in t.best.values if not name.endswith(STDERR))
    others = [name for name in metrics if name != data.metric]
    rivals = {r.candidate.trial.trial_id: r for r in data.choice.recommendation.rivals} if data.choice else {}
    seeds = data.over_seeds
    columns = ["#", "trial", "state", data.metric, *(["mean over seeds"] if seeds else []), "difference from winner"]
    columns += [*fields, "step", *others, "best at step"]
    columns += ["parameters", "tokens", "tokens/s", "memory GiB", "time", "GPU time"]
    rows = []
    for place, trial in enumerate(data.trials, 1):
        best = trial.best
        rows.append(
            [
                cell(place), Cell(_marked_name(data, trial), trial.trial_id), cell(str(trial.state)),
                cell(value_of(trial)), *([_mean(seeds.get(trial.trial_id))] if seeds else []),
                _difference(data, trial, rivals.get(trial.trial_id)),
                *(cell(trial.config.varied.get(name)) for name in fields),
                Cell(f"{trial.step}/{trial.total_steps or '?'}", trial.step),
                *(cell(best.values.get(name) if best else None) for name in others),
                cell(best.step if best else None), cell(trial.num_parameters), cell(trial.tokens),
                cell(trial.tokens_per_second), cell(trial.peak_memory_gib),
                Cell(duration(trial.seconds), trial.seconds),
                Cell(duration(trial.gpu_seconds) if trial.gpu_seconds else "", trial.gpu_seconds),
            ]
        )  # fmt: skip
    leader = data.leader.trial_id if data.leader else None
    marked = next((place for place, trial in enumerate(data.trials) if trial.trial_id == leader), None)
    return table(columns, rows, marked)


def _marked_name(data: SweepData, trial: TrialResult) -> str:
    leads = data.leader is not None and trial.trial_id == data.leader.trial_id
    is_other = data.choice is not None and trial.trial_id == data.choice.trial.trial_id and not leads
    return f"{trial.trial_id}{' (winner)' if leads else ' (recommended)' if is_other else ''}"


def _mean(values: list[float] | None) -> Cell:
    return Cell(f"{say_number(fmean(values))} ({len(values)})", fmean(values)) if values else Cell("", _LAST)


def _difference(data: SweepData, trial: TrialResult, rival: ComparedCandidate | None) -> Cell:
    if data.leader is not None and trial.trial_id == data.leader.trial_id:
        return Cell("0", 0.0)
    if rival is None:
        return Cell("" if value_of(trial) is None else "not compared", _LAST)
    interval = f"{rival.difference:+.2g} ({rival.low:+.2g} to {rival.high:+.2g})"
    verdict = "tied" if rival.is_tied else "worse" if rival.difference * data.sign > 0 else "better"
    return Cell(f"{interval} {verdict}", rival.difference * data.sign)


def how_chosen(data: SweepData) -> str:
    """Return the sentence that says how the winner was chosen; empty without a winner or another trial."""
    leader, choice, seeds = data.leader, data.choice, data.over_seeds
    if leader is None or len(data.trials) < 2:
        return ""
    if seeds:
        text = (
            f"The winner, {leader.trial_id}, has the best mean of {data.metric} over seeds among the "
            f"{counted(len(seeds), 'finalist')} that ran again; the rows are in the order of {data.metric} with the "
            "first seed alone, which can differ."
        )
    else:
        text = f"The winner, {leader.trial_id}, has the best {data.metric} among the trials that have finished."
    if choice is not None and choice.trial.trial_id != leader.trial_id:
        text += f" Recommended is {choice.trial.trial_id}, which is tied with it and has a smaller adapter."
    return text


def legend(data: SweepData) -> str:
    """Return how to read the differences of the table."""
    level = f"{CONFIDENCE:.0%}"
    if data.over_seeds:
        basis = (
            f"A difference is the trial's mean over seeds minus the winner's (number of seeds in parentheses), with "
            f"the {level} interval over held-out rows and seeds. Only finalists were compared so."
        )
    else:
        basis = (
            f"A difference is the trial's value minus the winner's, with the {level} interval of the paired bootstrap "
            "over the held-out rows."
        )
    stopped = any(trial.state == TrialState.STOPPED for trial in data.trials)
    until = " A STOPPED trial has its best value until it was stopped, not that of its end." if stopped else ""
    return (
        f"{basis}{until} Tied: the interval holds zero, so the two cannot be told apart. Not compared: no interval was "
        "computed, so whether the trial is worse cannot be said."
    )


def cell(value: Any) -> Cell:
    """Return the cell of a value; empty, and last in order, for None."""
    if value is None:
        return Cell("", _LAST)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(say_number(value), float(value) if abs(value) < _LAST else _LAST)
    return Cell(str(value), str(value))


def table(columns: list[str], rows: list[list[Cell]], marked: int | None = None) -> Table:
    """Return a table; a column whose keys are all numbers is one of numbers."""
    kinds = [all(not isinstance(row[i].key, str) for row in rows) for i in range(len(columns))]
    return Table(columns, rows, kinds, marked)
