"""Format trials as tables and lines."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from orchestrator.record import TrialResult, TrialState
from orchestrator.report.trial_columns import TrialLines, duration, lay_out, number
from orchestrator.spec import SweepSpec
from orchestrator.words import counted

__all__ = ["TrialsTable", "axes_of", "duration", "failure_line", "number", "say_failures"]

_LEADERS = 3
"""Share of the rows that the leaders always have: one in so many."""


class TrialsTable:
    """A table with a row per trial: state, step, best evaluation and searched values. It fits any width."""

    def __init__(
        self,
        trials: Sequence[TrialResult],
        title: str | None = None,
        axes: Sequence[str] = (),
        with_sizes: bool = False,
        max_lines: int | None = None,
    ) -> None:
        """
        Args:
            trials: the trials, in the order in which to show them; best first if there is no place for all.
            title: a line above the table.
            axes: searched and tied fields in the order of their columns; others follow.
            with_sizes: add a column with the number of the adapter's parameters.
            max_lines: lines that the table may have; None for all trials.
        """
        self._trials = trials
        self._title = title
        self._axes = axes
        self._with_sizes = with_sizes
        self._max_lines = max_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        if self._title:
            yield Text(self._title, "italic")
        if self._trials:
            for line in self._lines(options.max_width):
                line.no_wrap, line.overflow = True, "ignore"
                yield line

    def _lines(self, width: int) -> list[Text]:
        everything = lay_out(self._trials, width, self._axes, self._with_sizes)
        rows = everything.rows
        if self._max_lines is None or len(everything.head) + sum(map(len, rows)) <= self._max_lines:
            return [*everything.head, *(line for row in rows for line in row)]
        return self._shortened(everything, self._max_lines)

    def _shortened(self, everything: TrialLines, max_lines: int) -> list[Text]:
        """Return the rows of leaders and running trials, and a line that counts the others."""
        height = max(map(len, everything.rows))
        num_rows = max((max_lines - len(everything.head) - 1) // height, 1)
        shown = chosen(self._trials, num_rows)
        left_out = Counter(str(trial.state) for i, trial in enumerate(self._trials) if i not in shown)
        states = ", ".join(f"{count} {state}" for state, count in left_out.items())
        lines = [line for index in sorted(shown) for line in everything.rows[index]]
        return [*everything.head, *lines, Text(f"and {left_out.total()} more: {states}", "dim")]


def axes_of(spec: SweepSpec) -> list[str]:
    """Return the searched fields, then the tied ones, as the experiment lists them."""
    return [*spec.search.space, *spec.search.tied]


def chosen(trials: Sequence[TrialResult], num_rows: int) -> set[int]:
    """Choose which trials to show if there are more than rows.

    A third of the rows goes to the leaders, the rest to running trials; rows that these leave free go to the next best.

    Args:
        trials: all trials, best first.
        num_rows: trials to choose.

    Returns:
        Indices into `trials`.
    """
    leaders = list(range(len(trials)))[: -(-num_rows // _LEADERS)]
    running = [index for index, trial in enumerate(trials) if trial.state == TrialState.RUNNING]
    by_importance = dict.fromkeys([*leaders, *running, *range(len(trials))])
    return set(list(by_importance)[:num_rows])


def failure_line(trial: TrialResult) -> str:
    """Return one line on a failed trial: its step, the kind of failure and the reason."""
    kind = f" ({trial.failure.replace('_', ' ')})" if trial.failure else ""
    reason = "; ".join(line.strip() for line in (trial.error or "unknown reason").splitlines())
    return f"{trial.trial_id} {trial.state} at step {trial.step}{kind}: {reason}"


def say_failures(console: Console, trials: Sequence[TrialResult]) -> None:
    """Print which trials failed or were canceled, and why. Print nothing if there are none."""
    failed = [trial for trial in trials if trial.state == TrialState.FAILED]
    lines = [f"{len(failed)} of {counted(len(trials), 'trial')} failed:"] if failed else []
    lines += [f"  {failure_line(trial)}" for trial in failed]
    lines += [failure_line(trial) for trial in trials if trial.state == TrialState.CANCELLED]
    if lines:
        console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
