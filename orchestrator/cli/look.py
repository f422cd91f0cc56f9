"""Commands that look at sweeps: status, watch, list and board."""

import os
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.frame import Json, Sweep, Where, app, console_on, print_json, table_lines
from orchestrator.cli.screen import until_signal
from orchestrator.errors import RequestError
from orchestrator.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.record import SweepRecord


@app.command(epilog="Example: orchestrator status runs/demo --json")
def status(sweep: Sweep, as_json: Json = False, output: Where = "runs") -> None:
    """Show a sweep's trials, best first, and whether a driver runs it."""
    from orchestrator.remote.view import view_sweep

    record = view_sweep(sweep, output)
    if as_json:
        print_json(_as_document(record))
    else:
        _show(console_on(), record)


@app.command(epilog="Example: orchestrator watch runs/demo")
def watch(sweep: Sweep, output: Where = "runs") -> None:
    """Follow a running sweep until it ends.

    Shows what the command that runs it shows, on any machine that sees its folder or its object store. Ctrl-C ends this
    view, not the sweep.
    """
    from orchestrator.record import read_sweep
    from orchestrator.remote.view import refreshing, view_sweep
    from orchestrator.report.watch import watch_sweep

    record, console = view_sweep(sweep, output), console_on()
    with until_signal(), refreshing(record):
        watch_sweep(console, record)
    _show(console, read_sweep(record.paths.root), max_lines=table_lines(console))


def _show(console: "Console", record: "SweepRecord", max_lines: int | None = None) -> None:
    from orchestrator.record import PresentTrials, find_damage
    from orchestrator.report.standing import standing_lines
    from orchestrator.report.tables import TrialsTable, axes_of, say_failures
    from orchestrator.report.warnings import distinct_warnings
    from orchestrator.spec.search import SEED

    present = PresentTrials(record)
    trials, repeats = present.read(), present.repeats()
    title = f"{record.paths.name}: {len(trials)} of {record.info.num_trials} started"
    console.print(TrialsTable(trials, title, axes_of(record.info.spec), max_lines=max_lines))
    if repeats:
        axes = [*axes_of(record.info.spec), SEED]
        console.print(TrialsTable(repeats, "the finalists again, with other seeds", axes))
    say_failures(console, [*trials, *repeats])
    lines = [
        f"warning ({counted(number, 'trial')}): {warning}"
        for warning, number in distinct_warnings([*trials, *repeats]).values()
    ]
    lines += [
        f"prior evidence, no trials of this sweep: {counted(len(prior.trials), 'trial')} of {prior.name} "
        f"({prior.created[:10]})"
        for prior in record.info.prior_sweeps
    ]
    lines += [str(over) for over in (record.budget_spent(), record.search_ended()) if over]
    lines += [f"damaged: {damage}" for damage in find_damage(record)]
    for line in lines + standing_lines(record, trials, repeats):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _as_document(record: "SweepRecord") -> dict[str, object]:
    from orchestrator.record import PresentTrials, find_damage, is_finished, totals
    from orchestrator.record.held import only_paused
    from orchestrator.record.lock import driver_state

    search, driver = record.info.spec.search, driver_state(record.paths)
    spent, ended = record.budget_spent(), record.search_ended()
    present = PresentTrials(record)
    trials, repeats = present.read(), present.repeats()
    used = totals([*trials, *repeats])
    return {
        "sweep": record.paths.name,
        "folder": str(record.paths.root),
        "metric": search.metric,
        "mode": search.resolved_mode,
        "num_trials": record.info.num_trials,
        "is_running": driver.is_running,
        "is_finished": is_finished(record, trials),
        "only_paused": only_paused(record, trials),
        "seconds_since_last_sign": round(driver.silent_s, 1),
        "tokens": used.tokens,
        "gpu_hours": round(used.gpu_hours, 6),
        "budget_spent": spent and spent.model_dump(mode="json"),
        "search_ended": ended and ended.model_dump(mode="json"),
        "damaged": [str(damage) for damage in find_damage(record)],
        "prior_sweeps": [prior.model_dump(mode="json") for prior in record.info.prior_sweeps],
        "trials": [trial.model_dump(mode="json") for trial in trials],
        "repeats": [trial.model_dump(mode="json") for trial in repeats],
    }


@app.command(epilog="Example: orchestrator list --output runs")
def list(as_json: Json = False, output: Where = "runs") -> None:  # the command's name
    """List all sweeps in a folder, the newest first."""
    from orchestrator.remote.view import view_output
    from orchestrator.report.sweeps import sweep_rows, sweeps_lines

    rows = sweep_rows(view_output(output))
    if as_json:
        print_json(rows)
        return
    console = console_on()
    for line in sweeps_lines(rows, output, console.width):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command(epilog="Example: orchestrator board runs/demo --port 6006")
def board(
    sweep: Sweep,
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Port; 0 picks a free one.")] = 6006,
    output: Where = "runs",
) -> None:
    """Open TensorBoard on a sweep: curves, and all trials in a table."""
    from orchestrator.record import read_sweep

    record = read_sweep(sweep, output)
    if not record.paths.tensorboard.is_dir():
        raise RequestError(f"{record.paths.root}: there are no TensorBoard files", "tracking.tensorboard was false.")
    _require_free(port)
    arguments = ["-m", "tensorboard.main", "--logdir", str(record.paths.tensorboard), "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *arguments])


def _require_free(port: int) -> None:
    """Check that a port of this machine can be listened on.

    Raises:
        RequestError: another process has it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except OSError as error:
            raise RequestError(
                f"port {port}: cannot be used: {error.strerror}", "Give another one: --port 0 picks a free one."
            ) from error
