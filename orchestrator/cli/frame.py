"""What all verbs share: the application, options, and where lines are printed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.record import SweepRecord

app = typer.Typer(
    name="orchestrator",
    help="QLoRA sweeps on Ray: from an experiment file to the best adapter.",
    epilog="Exit codes: 0 done; 1 failed while running; 2 the request is wrong, nothing was started; "
    "3 there is a best adapter, but some trials failed; interrupted: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP, "
    "74 by a disk that is full or fails.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)]
Sweep = Annotated[str, typer.Argument(help="Folder of a sweep, or its name under --output.", show_default=False)]
SweepOrAdapter = Annotated[
    str, typer.Argument(help="A sweep, whose best is taken, or an adapter folder.", show_default=False)
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=v", help="Set a field; a searched or tied one is then fixed.")
]
Seed = Annotated[int | None, typer.Option(help="search.seed: the same one gives the same sequence of trials.")]
Name = Annotated[str | None, typer.Option(help="Name of the sweep's folder.")]
Output = Annotated[str | None, typer.Option(help="Folder that holds sweeps; default the experiment's, runs.")]
Where = Annotated[str, typer.Option("--output", help="Folder that holds sweeps.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base of an adapter folder.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster (`auto`, or HOST:PORT); default a local Ray.")]


def console_on(file: TextIO | None = None) -> "Console":
    """A console as wide as the terminal; a table in a pipe or a file is not cut to 80 columns."""
    from rich.console import Console

    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=160)


def now_and_then(say: Callable[[str], None], interval_s: float = 2.0) -> Callable[[str], None]:
    """Pass on at most one line of progress in `interval_s` seconds, counted from the first line, which is not told."""
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
    """What became of rows that did not stay as they were."""
    info, most = record.info, record.info.spec.data.max_length
    sources = info.sources if len(info.sources) > 1 else []
    for source in sources:
        weight = f", weight {source.weight:g}" if source.weight is not None else ""
        line = f"rows: {source.num_taken} of the {source.num_read} of {source.source}{weight}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    num_bad = sum(bad.num_rows for bad in info.bad_rows)
    used, cut = info.num_train + info.num_held_out, info.spec.data.truncate
    read = used + info.num_dropped
    lines = [f"  {bad}" for bad in info.bad_rows]
    if num_bad:
        lines.insert(0, f"note: {num_bad} of {read + num_bad} rows cannot be read by the format, and were left out")
    told = [
        (info.num_truncated, read, f"rows were cut to data.max_length={most} tokens ({cut})"),
        (info.num_dropped, read, "rows had no token to learn from after the cut, and were left out"),
        (info.num_shared, info.num_held_out, "held-out rows are training rows too: their loss says little"),
    ]
    lines += [f"note: {number} of {total} {what}" for number, total, what in told if number]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_best(console: "Console", record: "SweepRecord") -> None:
    say_rows(console, record)
    from orchestrator.deploy import FinishedSweep
    from orchestrator.report.best import say_best

    say_best(console, FinishedSweep(record).best())
