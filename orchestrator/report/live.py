"""Live view of a running sweep, for the terminal."""

import time
from collections.abc import Callable
from datetime import datetime
from textwrap import wrap
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from orchestrator.record import OPEN, TrialResult, TrialState
from orchestrator.report.pace import TokenPace
from orchestrator.report.tables import TrialsTable, axes_of, duration, failure_line, number
from orchestrator.report.time_left import TimeLeft
from orchestrator.report.warnings import distinct_warnings
from orchestrator.spec import SweepSpec
from orchestrator.words import counted

_SUMMARY_S = 30.0
"""Seconds between two summaries where there is no live table."""


class SweepView:
    """Shows a running sweep: a live table on a terminal, else a line for each change and a summary now and then."""

    def __init__(
        self,
        console: Console,
        spec: SweepSpec,
        num_trials: Callable[[], int],
        title: str,
        has_ended_itself: Callable[[], bool] = lambda: False,
        *,
        driver: Callable[[], str] = lambda: "",
        elapsed_s: float = 0.0,
    ) -> None:
        """Create a view. Nothing is printed yet.

        Args:
            console: where to print.
            spec: the experiment.
            num_trials: returns the number of trials that the sweep will have; people may change it.
            title: printed before the first message or table, because the sweep may be refused before that.
            has_ended_itself: returns whether no trial comes beside those that `update` shows.
            driver: returns a sentence on the process that runs the sweep, where that is another one.
            elapsed_s: seconds since that process began.
        """
        self._console = console
        # Decided once: after the terminal is closed this would be False, while the live table still has to be stopped.
        self._is_live = is_live(console)
        self._title: str | None = title
        self._axes = axes_of(spec)
        self._num_trials = num_trials
        self._total = num_trials()
        self._has_ended_itself = has_ended_itself
        self._driver = driver
        self._trials: list[TrialResult] = []
        self._began = time.monotonic() - elapsed_s
        self._time_left = TimeLeft(spec)
        self._tokens = TokenPace()
        self._doing: str | None = None
        self._said: set[str] = set()
        self._summary_at = time.monotonic()
        # Libraries print to the driver's log: their output must not come between the table's lines.
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()
            if error is not None and self._trials:  # otherwise the command prints the final table
                self._console.print(self._render())

    def say(self, sentence: str) -> None:
        """Print a message below the title."""
        self._print_title()
        self._print(sentence)

    def doing(self, what: str) -> None:
        """Name the work that goes on until the next message or step, such as `starting Ray`."""
        self._doing = what
        if not self._is_live:
            self._print(f"{what} ...")

    def update(self, trials: list[TrialResult]) -> None:
        """Show these trials, best first."""
        self._print_title()
        is_first, self._trials = not self._trials, trials
        planned = 0 if self._has_ended_itself() else self._num_trials()
        self._total = max(planned, len(trials))  # finalists that run again come after the trials of the search
        self._time_left.update(trials, self._total)
        self._tokens.update(trials)
        if any(trial.step and trial.state in OPEN for trial in trials):
            self._doing = None
        self._say_warnings()
        self._say_failures()
        if self._is_live:
            self._say_stops(is_news=not is_first)
        else:
            self._say_changes()

    def _print_title(self) -> None:
        if self._title:
            self._print(self._title)
            self._title = None

    def _print(self, sentence: str) -> None:
        at = "" if self._is_live else f"{datetime.now():%H:%M:%S} "
        self._console.print(at + sentence, soft_wrap=True, highlight=False, markup=False)

    def _render(self) -> RenderableType:
        width, height = self._console.size
        summary = [Text(line) for part in self._summary() for line in wrap(part, width)]
        if not self._trials:
            return Group(*summary)
        max_lines = max(height - len(summary) - 1, 4)
        return Group(TrialsTable(self._trials, axes=self._axes, max_lines=max_lines), *summary)

    def _summary(self) -> list[str]:
        """Return the lines below the table: how far the sweep is, and the best trial with the pace."""
        states = [trial.state for trial in self._trials]
        num_failed, num_running = states.count(TrialState.FAILED), states.count(TrialState.RUNNING)
        parts = [
            f"{sum(state not in OPEN for state in states)} of {counted(self._total, 'trial')} ended"
            + (f" ({num_failed} failed)" if num_failed else ""),
            *([f"{num_running} running"] if num_running else []),
            f"{duration(time.monotonic() - self._began)} elapsed",
            *self._left(),
        ]
        best = next((trial for trial in self._trials if trial.best), None)
        second = []
        if best is not None and best.best is not None:
            second.append(f"best {best.metric} {number(best.best.value)} at step {best.best.step} ({best.trial_id})")
        if losses := [t.train_loss for t in self._trials if t.state == TrialState.RUNNING and t.train_loss is not None]:
            low, high = number(min(losses)), number(max(losses))
            second.append(f"train/loss {low}" + (f" to {high}" if low != high else ""))
        if num_running and (pace := self._tokens.per_second()) is not None:
            second.append(f"{pace:,.0f} tokens/s")
        lines = [", ".join(parts), ", ".join(second), self._driver(), f"{self._doing} ..." if self._doing else ""]
        return [line for line in lines if line]

    def _left(self) -> list[str]:
        is_over = self._trials and len(self._trials) >= self._total and all(t.state not in OPEN for t in self._trials)
        found = None if is_over else self._time_left.range()
        if found is None:
            return []
        low, high = map(duration, found)
        return [f"{low} to {high} left" if low != high else f"{low} left"]

    def _say_warnings(self) -> None:
        """Print each warning once, even if several trials have it."""
        for key, (warning, _) in distinct_warnings(self._trials).items():
            self._say_once(f"warning: {warning}", key)

    def _say_failures(self) -> None:
        """Print each failure once. The live table, which may have no place for it, disappears at the end."""
        for trial in self._trials:
            if trial.state == TrialState.FAILED:
                self._say_once(failure_line(trial), f"{trial.trial_id} failed")

    def _say_stops(self, is_news: bool) -> None:
        """Print why trials were stopped, each once; the table has no place for it. What was there before is no news."""
        for trial in self._trials:
            if trial.stopped and is_news:
                self._say_once(f"{trial.trial_id} stopped at step {trial.step}: {trial.stopped}", trial.trial_id)
            elif trial.stopped:
                self._said.add(trial.trial_id)

    def _say_changes(self) -> None:
        """Print a line for each trial that has improved or ended since the last call, and a summary now and then."""
        for trial in self._trials:
            if trial.step and trial.state != TrialState.FAILED:
                best = f", {trial.metric} {number(trial.best.value)} at {trial.best.step}" if trial.best else ""
                why = f": {trial.error or trial.stopped}" if trial.error or trial.stopped else ""
                line = f"{trial.trial_id} {trial.state} step {trial.step}/{trial.total_steps or '?'}{best}{why}"
                self._say_once(line, f"{trial.trial_id} {trial.state}{best}")
        if time.monotonic() > self._summary_at + _SUMMARY_S:
            self._summary_at = time.monotonic()
            self._print("; ".join(self._summary()))

    def _say_once(self, line: str, key: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._print(line)


def is_live(console: Console) -> bool:
    """Return whether lines of this console can be rewritten: it is a terminal, and not one with TERM=dumb."""
    return console.is_terminal and not console.is_dumb_terminal
