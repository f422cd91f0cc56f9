"""Live view of a trial that runs in this process, for the terminal."""

import time
from datetime import datetime
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from orchestrator.record import MetricPoint
from orchestrator.report.live import is_live
from orchestrator.report.tables import duration, number

_LINE_S = 10.0
"""Seconds between two lines of progress where there is no progress bar."""


class TrialView:
    """Shows a trial that runs in this process as a progress bar. A `Watcher` that never stops the trial."""

    def __init__(self, console: Console, title: str) -> None:
        """Create a view.

        Args:
            console: where to print.
            title: printed at the first step, because the trial may be refused before that.
        """
        self._title: str | None = title
        self._console = console
        self._is_live = is_live(console)
        self._began: tuple[float, int] | None = None
        """Time and step of the first step seen."""
        self._line_at = time.monotonic()
        # Libraries print to the driver's log: their output must not come between the bar's lines.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._is_live,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("loading", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def doing(self, what: str) -> None:
        """Name the work that goes on until the first step, such as `loading the base`."""
        self._progress.update(self._task, description=what)
        if not self._is_live:
            self._print(f"{what} ...")

    def on_step(self, step: int, total_steps: int) -> bool:
        """Advance the progress bar; where there is none, print a line now and then."""
        if self._title:
            self._print(self._title)
            self._title = None
        self._progress.update(self._task, completed=step, total=total_steps, description="training")
        now = time.monotonic()
        self._began = self._began or (now, step)
        if not self._is_live and now > self._line_at + _LINE_S:
            self._line_at = now
            since, first = self._began
            left = (now - since) / (step - first) * (total_steps - step) if step > first else None
            self._print(f"step {step}/{total_steps}" + (f", {duration(left)} left" if left is not None else ""))
        return True

    def on_report(self, point: MetricPoint) -> bool:
        """Print the values of an evaluation."""
        self._print(f"step {point.step}: {', '.join(f'{name} {number(x)}' for name, x in point.values.items())}")
        return True

    def say(self, sentence: str) -> None:
        """Print a message above the progress bar."""
        self._print(sentence)

    def _print(self, line: str) -> None:
        at = "" if self._is_live else f"{datetime.now():%H:%M:%S} "
        self._console.print(at + line, soft_wrap=True, highlight=False, markup=False)
