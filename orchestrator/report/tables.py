"""Format trials as tables and lines."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orchestrator.record import TrialResult, TrialState
from orchestrator.spec.sections.evaluation import STDERR
from orchestrator.words import counted

_COLORS = {
    TrialState.RUNNING: "cyan",
    TrialState.PAUSED: "blue",
    TrialState.COMPLETE: "green",
    TrialState.STOPPED: "yellow",
    TrialState.FAILED: "red",
    TrialState.CANCELLED: "magenta",
}


def trials_table(trials: Sequence[TrialResult], title: str | None = None, sizes: bool = False) -> Table:
    """Return a table with a row per trial, in the order given: state, step, best evaluation and searched values.

    Args:
        trials: the trials.
        title: the table's title.
        sizes: add a column with the number of the adapter's parameters.
    """
    fields = list(dict.fromkeys(name for trial in trials for name in trial.config.varied))
    metrics = list(dict.fromkeys(name for trial in trials if trial.best for name in trial.best.values))
    metric = trials[0].metric if trials else "eval/loss"
    others = [name for name in metrics if name not in (metric, "eval/token_accuracy") and not name.endswith(STDERR)]
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("trial", "state"):
        table.add_column(name, no_wrap=True)
    for name in (
        "step",
        metric,
        "at",
        *(name.partition("/")[2] for name in others),
        *(name.partition(".")[2] for name in fields),
        *(["size"] if sizes else []),
        "time",
    ):
        table.add_column(name, justify="right")
    for trial in trials:
        best = trial.best
        table.add_row(
            trial.trial_id,
            f"[{_COLORS.get(trial.state, 'default')}]{trial.state}[/]",
            f"{trial.step}/{trial.total_steps or '?'}",
            number(best.value) if best else "",
            str(best.step) if best else "",
            *(number(best.values[name]) if best and name in best.values else "" for name in others),
            *(number(trial.config.varied.get(name, "")) for name in fields),
            *([f"{trial.num_parameters or 0:,}"] if sizes else []),
            duration(trial.seconds),
        )
    return table


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
