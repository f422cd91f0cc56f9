"""Lay out trials as lines of text that fit a terminal. No metric, step or searched value is ever cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from orchestrator.record import OPEN, TrialResult, TrialState
from orchestrator.spec.sections.evaluation import STDERR

_COLORS = {
    TrialState.RUNNING: "cyan",
    TrialState.PAUSED: "blue",
    TrialState.COMPLETE: "green",
    TrialState.STOPPED: "yellow",
    TrialState.FAILED: "red",
    TrialState.CANCELLED: "magenta",
}
_INDENT = "  "


@dataclass(frozen=True)
class Column:
    """One value of each trial."""

    head: str
    """Its head; line breaks separate the head's lines."""
    cells: list[str]
    """The trials' values, as text."""
    is_left: bool = False
    """Whether cells are aligned to the left."""

    @property
    def width(self) -> int:
        """The widest cell or line of the head, in terminal columns."""
        return max(map(cell_len, [*self.head.split("\n"), *self.cells]), default=0)

    def stacked(self) -> "Column":
        """Return the column with its head on several lines, broken after `/` and at `_`."""
        parts = self.head.replace("/", "/\n").split("\n")
        return replace(self, head="\n".join(line for part in parts for line in part.split("_")))

    def aligned(self, text: str) -> str:
        """Return `text` filled with spaces to the column's width."""
        missing = " " * (self.width - cell_len(text))
        return text + missing if self.is_left else missing + text


@dataclass(frozen=True)
class TrialLines:
    """A table as text: the lines of its head, and the lines of each trial."""

    head: list[Text]
    rows: list[list[Text]]


def lay_out(
    trials: Sequence[TrialResult], width: int, axes: Sequence[str] = (), with_sizes: bool = False
) -> TrialLines:
    """Lay trials out in `width` terminal columns.

    If the width is not enough for everything, the heads get several lines, then less important columns are left out.
    If the searched values still do not fit, they follow each trial on lines of their own.

    Args:
        trials: the trials, in the order in which to show them.
        width: columns of the terminal.
        axes: searched and tied fields in the order of their columns; others follow.
        with_sizes: add a column with the number of the adapter's parameters.
    """
    fixed, optional, searched = _columns(trials, axes, with_sizes)
    states = [trial.state for trial in trials]
    everything = [*fixed, *optional, *searched]
    if _width(everything, 2) <= width:
        return _joined(everything, states, width)
    if (few := _fitting(fixed, optional, searched, width)) is not None:
        return _joined(few, states, width)
    lines = _joined(_fitting(fixed, optional, [], width) or fixed, states, width)
    rows = [[*row, *_values_of(searched, index, width)] for index, row in enumerate(lines.rows)]
    return TrialLines(lines.head, rows)


def number(value: Any) -> str:
    """Format a value in a few characters."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format seconds as `45s`, `3m20s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def searched_names(trials: Sequence[TrialResult], axes: Sequence[str]) -> dict[str, str]:
    """Map the trials' searched fields to short names, in the order of `axes`. A short name means one field only."""
    found = dict.fromkeys(name for trial in trials for name in trial.config.varied)
    fields = list(dict.fromkeys([*(name for name in axes if name in found), *found]))
    last = [name.rpartition(".")[2] for name in fields]
    return {
        name: short if last.count(short) == 1 else name.partition(".")[2]
        for name, short in zip(fields, last, strict=True)
    }


def _columns(
    trials: Sequence[TrialResult], axes: Sequence[str], with_sizes: bool
) -> tuple[list[Column], list[Column], list[Column]]:
    """Return the columns that always stay, those that may be left out (the last one first), and the searched fields."""
    metric = trials[0].metric if trials else "eval/loss"
    measured = dict.fromkeys(name for trial in trials if trial.best for name in trial.best.values)
    others = [name for name in measured if name not in (metric, "eval/token_accuracy") and not name.endswith(STDERR)]
    bests = [trial.best for trial in trials]
    fixed = [
        Column("trial", [trial.trial_id for trial in trials], is_left=True),
        Column("state", [str(trial.state) for trial in trials], is_left=True),
        Column("step", [f"{trial.step}/{trial.total_steps or '?'}" for trial in trials]),
        Column(metric, [number(best.value) if best else "" for best in bests]),
    ]
    losses = [
        number(trial.train_loss) if trial.state in OPEN and trial.train_loss is not None else "" for trial in trials
    ]
    optional = [
        *([Column("size", [f"{trial.num_parameters or 0:,}" for trial in trials])] if with_sizes else []),
        Column("at", [str(best.step) if best else "" for best in bests]),
        *([Column("train/loss", losses)] if any(losses) else []),
        Column("time", [duration(trial.seconds) for trial in trials]),
        *(
            Column(
                name.partition("/")[2],
                [number(best.values[name]) if best and name in best.values else "" for best in bests],
            )
            for name in others
        ),
    ]
    searched = [
        Column(short, [number(trial.config.varied.get(field, "")) for trial in trials])
        for field, short in searched_names(trials, axes).items()
    ]
    return fixed, optional, searched


def _fitting(fixed: list[Column], optional: list[Column], searched: list[Column], width: int) -> list[Column] | None:
    """Return the columns with stacked heads and as many of the optional ones as fit; None if the others do not fit."""
    for kept in range(len(optional), -1, -1):
        columns = [column.stacked() for column in (*fixed, *optional[:kept], *searched)]
        if _width(columns, 1) <= width:
            return columns
    return None


def _width(columns: Sequence[Column], gap: int) -> int:
    return sum(column.width for column in columns) + gap * (len(columns) - 1)


def _joined(columns: Sequence[Column], states: Sequence[TrialState], width: int) -> TrialLines:
    """Return the columns side by side, with the heads at the bottom of their lines and a rule below."""
    gap = 2 if _width(columns, 2) <= width else 1
    space = " " * gap
    height = max(column.head.count("\n") for column in columns) + 1
    heads = [column.head.split("\n") for column in columns]
    filled = [[""] * (height - len(head)) + head for head in heads]
    head = [
        Text(space.join(column.aligned(lines[row]) for column, lines in zip(columns, filled, strict=True)), "bold")
        for row in range(height)
    ]
    head.append(Text("─" * _width(columns, gap), "dim"))
    rows = []
    for index, state in enumerate(states):
        line = Text()
        for place, column in enumerate(columns):
            line.append(space if place else "")
            line.append(column.aligned(column.cells[index]), _COLORS.get(state, "") if column.head == "state" else "")
        rows.append([line])
    return TrialLines(head, rows)


def _values_of(searched: Sequence[Column], index: int, width: int) -> list[Text]:
    """Return the searched values of a trial as indented lines. Name and value stay on one line."""
    pairs = [f"{column.head} {column.cells[index]}" for column in searched if column.cells[index]]
    joined = ", ".join(pair.replace(" ", "\0") for pair in pairs)
    lines = wrap(joined, max(width - len(_INDENT), 1), break_on_hyphens=False)
    return [Text(_INDENT + line.replace("\0", " "), "dim") for line in lines]
