"""What the report says of a sweep, as plain values for HTML and for Markdown."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.analysis.next_step import reproduce_command
from orchestrator.analysis.sweep_data import SweepData, value_of
from orchestrator.analysis.verdict import Verdict, find_verdict
from orchestrator.analysis.wording import say_number, say_short
from orchestrator.page.curves import leaders_compared
from orchestrator.page.figures import FIGURES, figure_height
from orchestrator.page.trials_table import Cell, Table, cell, how_chosen, legend, table, trials_table
from orchestrator.record import OPEN, TrialState
from orchestrator.record.rows import doubtful_rows
from orchestrator.report.tables import duration
from orchestrator.report.warnings import distinct_warnings
from orchestrator.words import counted


@dataclass(frozen=True)
class Plot:
    """A figure of the page, or why it is not there."""

    name: str
    title: str
    note: str
    json: str | None
    height: int
    why_none: str


@dataclass(frozen=True)
class Failure:
    """A failed or canceled trial."""

    trial: str
    step: int
    cause: str
    reason: str


@dataclass(frozen=True)
class SweepSections:
    """The report of one sweep."""

    data: SweepData
    name: str
    folder_word: str
    """The folder as the shell reads it."""
    state: str
    verdict: Verdict
    leaders: Table
    how_chosen: str
    """How the winner was chosen, in a sentence; empty if there is nothing to say."""
    legend: str
    """How to read the table of trials."""
    plots: list[Plot]
    failures: list[Failure]
    warnings: list[str]
    reproduce: str
    caveats: list[str]
    """Why the command may not give the same results."""
    facts: list[tuple[str, str]]
    experiment: str


def sections_of(data: SweepData, with_figures: bool = True) -> SweepSections:
    """Return the report of a sweep."""
    verdict = find_verdict(data)
    return SweepSections(
        data=data,
        name=data.name,
        folder_word=shlex.quote(str(data.record.paths.root)),
        state=_state(data),
        verdict=verdict,
        leaders=trials_table(data),
        how_chosen=how_chosen(data),
        legend=legend(data),
        plots=[
            _plot(each.name, each.title, each.note, each.draw(data, verdict.importances))
            for each in (FIGURES if with_figures else ())
        ],
        failures=_failures(data),
        warnings=_warnings(data),
        reproduce=reproduce_command(data),
        caveats=_caveats(data),
        facts=_facts(data),
        experiment=yaml.safe_dump(data.info.spec.model_dump(mode="json"), sort_keys=False, default_flow_style=None),
    )


def comparison(sweeps: Sequence[SweepSections]) -> Table:
    """Return a row for each sweep: its best trial, and what it has cost."""
    columns = ["sweep", "metric", "best", "trial", "trials", "failed", "tied", "tokens", "GPU-hours", "work"]
    rows = []
    for each in sweeps:
        data, cost, leader = each.data, each.verdict.cost, each.data.leader
        value = value_of(leader) if leader else None
        failed = sum(trial.state == TrialState.FAILED for trial in data.trials)
        tied = len(data.choice.recommendation.tied) if data.choice else None
        rows.append(
            [
                cell(each.name), cell(data.metric), cell(value), cell(leader.trial_id if leader else None),
                cell(len(data.trials)), cell(failed), cell(tied), cell(cost.tokens),
                cell(round(cost.gpu_hours, 3)), Cell(duration(cost.trial_seconds), cost.trial_seconds),
            ]
        )  # fmt: skip
    return table(columns, rows)


def comparison_notes(sweeps: Sequence[SweepSections]) -> list[str]:
    """Return the sentences on what differs between sweeps, and whether their values can be compared."""
    datas = [each.data for each in sweeps]
    if len({data.metric for data in datas}) > 1:
        return ["The sweeps have different metrics; their values cannot be compared."]
    notes = []
    if len({data.info.data_fingerprint for data in datas}) > 1:
        notes.append("The sweeps have different rows; a difference of their values may come from the rows alone.")
    known = [(value_of(d.leader), d) for d in datas if d.leader]
    ranked = sorted(((value, d) for value, d in known if value is not None), key=lambda pair: pair[1].sign * pair[0])
    if len(ranked) > 1:
        best, second = ranked[0], ranked[1]
        notes.append(
            f"Best is {best[1].name} with {best[1].metric} {say_number(best[0])}, before {second[1].name} with "
            f"{say_number(second[0])}. The sweeps' rows were not compared one by one, so whether chance explains the "
            "difference cannot be said."
        )
    first = datas[0].info.spec.model_dump(mode="json")
    for data in datas[1:]:
        changed = _differences(first, data.info.spec.model_dump(mode="json"))
        notes.append(f"{data.name} differs from {datas[0].name} in: {', '.join(changed) or 'nothing'}.")
    return notes


def _differences(one: dict[str, Any], other: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key in dict.fromkeys([*one, *other]):
        name = f"{path}{key}"
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and name not in ("search.space", "search.tied"):
            found += _differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name} ({_brief(a)} / {_brief(b)})")
    return found


def _brief(value: Any) -> str:
    text = say_short(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _state(data: SweepData) -> str:
    ended = sum(trial.state not in OPEN for trial in data.trials)
    text = f"{ended} of {counted(data.info.num_trials, 'trial')} ended"
    return text if data.is_over else f"{text}; this report shows the records as they were when it was made"


def compared_leaders(sweeps: Sequence[SweepSections]) -> Plot:
    """Return the curves of the sweeps' leaders in one figure."""
    drawn = leaders_compared([each.data for each in sweeps])
    return _plot("leaders", "The leaders of the sweeps", "The curve of each sweep's best trial.", drawn)


def _plot(name: str, title: str, note: str, drawn: Any) -> Plot:
    """Return a figure for the page, or the reason why there is none."""
    if isinstance(drawn, str):
        return Plot(name, title, note, None, 0, drawn)
    drawn.update_layout(template=None)
    return Plot(name, title, note, drawn.to_json(), figure_height(drawn), "")


def _failures(data: SweepData) -> list[Failure]:
    return [
        Failure(
            trial.trial_id,
            trial.step,
            "canceled" if trial.state == TrialState.CANCELLED else (trial.failure or "unknown").replace("_", " "),
            trial.error or "no reason was recorded",
        )
        for trial in data.trials
        if trial.state in (TrialState.FAILED, TrialState.CANCELLED)
    ]


def _warnings(data: SweepData) -> list[str]:
    found = [f"could not be read: {message}" for message in data.damaged]
    found += filter(None, doubtful_rows(data.info))
    for warning, number in distinct_warnings([*data.trials, *data.repeats]).values():
        found.append(f"{warning} ({counted(number, 'trial')})" if number > 1 else warning)
    untracked = sorted({name for trial in data.trials for name in trial.untracked})
    if untracked:
        found.append(f"these trackers miss a part of some trials: {', '.join(untracked)}")
    return found


def _facts(data: SweepData) -> list[tuple[str, str]]:
    info = data.info
    rows = f"{info.num_train} training, {info.num_held_out} held out, {info.num_test} test"
    facts = [
        ("folder", str(data.record.paths.root)),
        ("created", info.created),
        ("base", info.spec.base.model),
        ("rows", rows),
        ("data fingerprint", info.data_fingerprint),
        ("git commit", info.git_commit or "unknown"),
        ("search seed", str(info.spec.search.seed)),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items()) or "unknown"),
    ]
    facts += [("changed by resume", f"{c.field}: {c.before} to {c.after} ({c.changed})") for c in info.changes]
    return facts


def _caveats(data: SweepData) -> list[str]:
    spec, commit, found = data.info.spec, data.info.git_commit, list[str]()
    if commit is None:
        found.append("The git commit of the code is unknown.")
    elif commit.endswith("-dirty"):
        found.append("The git checkout had uncommitted changes (-dirty), so its commit alone does not give what ran.")
    if not spec.training.reproducible and any(trial.device not in (None, "cpu") for trial in data.trials):
        found.append(
            "training.reproducible was false: on a GPU, a trial that trains again gets similar values, not the same."
        )
    if len(data.trials) > 1 and (spec.search.algorithm not in ("random", "grid") or spec.scheduler.kind != "none"):
        found.append(
            "Which values are tried and which trials are stopped can depend on the order in which trials end; it can "
            "differ in another run."
        )
    return found
