"""Live views of a running sweep and of a running trial, for the terminal."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from orchestrator.record import OPEN, MetricPoint, TrialResult, TrialState
from orchestrator.report.tables import duration, failure_line, number, trials_table
from orchestrator.report.warnings import distinct_warnings
from orchestrator.words import counted


class SweepView:
    """Shows a running sweep: a live table on a terminal, else a line for each change."""

    def __init__(
        self, console: Console, total_trials: int, title: str, has_ended_itself: Callable[[], bool] = lambda: False
    ) -> None:
        """Create a view. Nothing is printed yet.

        Args:
            console: where to print.
            total_trials: number of trials that the sweep will have.
            title: printed before the first message or table, because the sweep may be refused before that.
            has_ended_itself: returns whether no trial comes beside those that `update` shows.
        """
        self._console = console
        # Decided once: after the terminal is closed this would be False, while the live table still has to be stopped.
        self._is_live = console.is_terminal
        self._title: str | None = title
        self._total = total_trials
        self._has_ended_itself = has_ended_itself
        self._trials: list[TrialResult] = []
        self._began = time.monotonic()
        self._first_seen: tuple[float, int] | None = None
        """Time and number of steps at the first update with steps. The pace leaves out start-up and earlier runs."""
        self._said: set[str] = set()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a message below the title."""
        self._print_title()
        self._console.print(sentence, soft_wrap=True, highlight=False)

    def update(self, trials: list[TrialResult]) -> None:
        """Show these trials, best first."""
        self._print_title()
        self._trials = trials
        if self._has_ended_itself():
            self._total = len(trials)
        self._total = max(self._total, len(trials))  # finalists that run again come after the trials of the search
        self._say_warnings()
        steps = sum(trial.step for trial in trials)
        if self._first_seen is None and steps:
            self._first_seen = time.monotonic(), steps
        if self._is_live:
            self._say_failures()
        else:
            self._say_changes()

    def _print_title(self) -> None:
        if self._title:
            self._console.print(self._title, soft_wrap=True, highlight=False)
            self._title = None

    def _render(self) -> RenderableType:
        return Group(trials_table(self._trials), self._summary()) if self._trials else self._summary()

    def _summary(self) -> Text:
        ended = sum(trial.state not in OPEN for trial in self._trials)
        num_failed = sum(trial.state == TrialState.FAILED for trial in self._trials)
        parts = [
            f"{ended} of {counted(self._total, 'trial')} ended" + (f" ({num_failed} failed)" if num_failed else ""),
            f"{duration(time.monotonic() - self._began)} elapsed",
        ]
        left = self._seconds_left()
        if left is not None:
            parts.append(f"at most {duration(left)} left")
        best = next((trial for trial in self._trials if trial.best), None)
        if best and best.best:
            parts.append(f"best {best.metric} {number(best.best.value)} ({best.trial_id})")
        if not self._trials:
            parts.append("starting workers")
        return Text(", ".join(parts))

    def _seconds_left(self) -> float | None:
        """Estimate the remaining time from the pace so far, as if no further trial were stopped early."""
        total_steps = max((trial.total_steps or 0 for trial in self._trials), default=0)
        if not total_steps or self._first_seen is None:
            return None
        since, steps_then = self._first_seen
        done = sum(trial.step for trial in self._trials) - steps_then
        if done <= 0:
            return None
        to_do = (self._total - len(self._trials)) * total_steps
        to_do += sum(total_steps - trial.step for trial in self._trials if trial.state in OPEN)
        return (time.monotonic() - since) / done * to_do

    def _say_warnings(self) -> None:
        """Print each warning once, even if several trials have it."""
        for key, (warning, _) in distinct_warnings(self._trials).items():
            if key not in self._said:
                self._said.add(key)
                self._console.print(f"warning: {warning}", soft_wrap=True, highlight=False, markup=False)

    def _say_failures(self) -> None:
        """Print each failure once above the live table, which may have no place for it and disappears at the end."""
        for trial in self._trials:
            if trial.state == TrialState.FAILED and trial.trial_id not in self._said:
                self._said.add(trial.trial_id)
                self._console.print(failure_line(trial), soft_wrap=True, highlight=False, markup=False)

    def _say_changes(self) -> None:
        """Print a line for each trial that has made steps or has failed since the last call."""
        for trial in self._trials:
            if trial.state == TrialState.FAILED:
                self._say_once(failure_line(trial))
                continue
            best = f", {trial.metric} {number(trial.best.value)} at {trial.best.step}" if trial.best else ""
            why = f": {trial.error or trial.stopped}" if trial.error or trial.stopped else ""
            line = f"{trial.trial_id} {trial.state} step {trial.step}/{trial.total_steps or '?'}{best}{why}"
            if trial.step:
                self._say_once(line)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            left = self._seconds_left()
            text = line + (f" (at most {duration(left)} left)" if left else "")
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class TrialView:
    """Shows a trial that runs in this process as a progress bar. A `Watcher` that never stops the trial."""

    def __init__(self, console: Console, title: str) -> None:
        """Create a view.

        Args:
            console: where to print.
            title: printed at the first step, because the trial may be refused before that.
        """
        self._title: str | None = title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("loading", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_step(self, step: int, total_steps: int) -> bool:
        """Advance the progress bar."""
        if self._title:
            self._progress.console.print(self._title, soft_wrap=True, highlight=False)
            self._title = None
        self._progress.update(self._task, completed=step, total=total_steps, description="training")
        return True

    def on_report(self, point: MetricPoint) -> bool:
        """Print the values of an evaluation."""
        values = ", ".join(f"{name} {number(value)}" for name, value in point.values.items())
        self._progress.console.print(f"step {point.step}: {values}", highlight=False)
        return True

    def say(self, sentence: str) -> None:
        """Print a message above the progress bar."""
        self._progress.console.print(sentence, soft_wrap=True, highlight=False, markup=False)
