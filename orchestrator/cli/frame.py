"""Shared by all commands: the application, its options, and printing."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from orchestrator import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.record import SweepRecord

app = typer.Typer(
    name="orchestrator",
    help="QLoRA sweeps on Ray: from an experiment file to the best adapter.",
    epilog="Exit codes: 0 done; 1 failed while running; 2 the request is wrong, nothing was started; "
    "3 there is a best adapter, but some trials failed; 130, 143, 129, 138, 74, 69 interrupted by Ctrl-C, SIGTERM, "
    "SIGHUP, SIGUSR1, a full or failing disk, or the death of Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


File = Annotated[Path, typer.Argument(metavar="FILE", help="Experiment file (YAML).", show_default=False)]
Sweep = Annotated[
    str, typer.Argument(metavar="SWEEP", help="Folder of a sweep, or its name under --output.", show_default=False)
]
SweepOrAdapter = Annotated[
    str,
    typer.Argument(
        metavar="SWEEP_OR_ADAPTER",
        help="A sweep (its best adapter is used) or an adapter folder.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=v", help="Set a field. A searched or tied field is then fixed. Repeatable."),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Set search.seed. The same seed gives the same sequence of trials.")
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the sweep's folder.")]
WarmFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--warm-from",
        metavar="SWEEP",
        help="A finished sweep on the same family of bases and kind of data: its trials are evidence for the search. "
        "Repeatable.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Parent folder of sweeps. Default: output.folder of the experiment (runs)."),
]
Where = Annotated[str, typer.Option("--output", metavar="DIR", help="Parent folder of sweeps.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Allow the base model of a sweep or an adapter folder to run its Python code."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Ray cluster to use: auto or HOST:PORT. Default: start Ray on this machine."),
]
Submit = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Submit this command as a job to the Ray cluster with this dashboard (http://HOST:8265), and return. "
        "--output is a folder of the cluster then.",
    ),
]

MoreTrials = Annotated[
    int | None,
    typer.Option("--trials", metavar="N", min=1, help="New total number of trials; larger than the present one."),
]
NewBudget = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="LIMIT=V", help="Change a limit of search.budget, for example gpu_hours=20."),
]

_LINES_BELOW = 8
"""Lines of a terminal that the last table of a command leaves for its title and for the lines below it."""


def console_on(file: TextIO | None = None) -> "Console":
    """Return a console that is as wide as the terminal. In a pipe or a file it has 160 columns instead of 80."""
    from rich.console import Console

    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=160)


def table_lines(console: "Console") -> int | None:
    """Return how many lines the last table of a command may have; None where the console is no terminal."""
    return max(console.height - _LINES_BELOW, _LINES_BELOW) if console.is_terminal else None


def now_and_then(say: Callable[[str], None], interval_s: float = 2.0) -> Callable[[str], None]:
    """Limit lines of progress to one per `interval_s` seconds.

    The interval starts with the first line, which is not passed on to `say`.
    """
    last: float | None = None

    def say_some(line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if last is not None and now - last >= interval_s:
            say(line)
        if last is None or now - last >= interval_s:
            last = now

    return say_some


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def say_rows(console: "Console", record: "SweepRecord") -> None:
    """Print how many rows each source gave, and how many were left out, truncated or shared with training."""
    from orchestrator.record.rows import notes_on_rows

    for line in notes_on_rows(record.info):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_best(console: "Console", record: "SweepRecord") -> None:
    from orchestrator.deploy import FinishedSweep
    from orchestrator.report.best import say_best

    say_best(console, FinishedSweep(record).best())
