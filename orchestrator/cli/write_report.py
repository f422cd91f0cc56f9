"""The command that reports on sweeps: report."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.cli.frame import Where, app
from orchestrator.cli.screen import until_signal
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from orchestrator.record import SweepRecord


@app.command(epilog="Example: orchestrator report runs/demo --open")
def report(
    sweeps: Annotated[
        list[str],
        typer.Argument(metavar="SWEEP", help="Folders of sweeps, or their names under --output."),
    ],
    open_: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    format: Annotated[
        Literal["html", "md", "csv", "parquet"],
        typer.Option(metavar="html|md|csv|parquet", help="html or md: a page; csv or parquet: the tables behind it."),
    ] = "html",
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="File of the page, or folder of the tables. Default: report.html, report.md or tables in the (first) "
            "sweep's folder.",
        ),
    ] = None,
    answers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="First ask the base and the best adapter N held-out prompts; loads the base."
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Serve the page on this machine instead, and refresh it while the sweep runs; Ctrl-C ends it.",
        ),
    ] = False,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", min=0, max=65535, help="Port of --live. Default: a free one.")
    ] = None,
    output: Where = "runs",
) -> None:
    """Write a page that says what a sweep has shown.

    It has the verdict in words, figures, and what to try next. It is one file that needs no network. Several sweeps
    are compared.
    """
    if live and (to is not None or format != "html"):
        raise RequestError("--live serves a page and writes no file", "Leave out --to and --format.")
    if port is not None and not live:
        raise RequestError("--port is the port of --live", "Add --live, or leave it out.")
    from orchestrator.analysis.sweep_data import read_data
    from orchestrator.deploy import open_sweep
    from orchestrator.page.report import write_report
    from orchestrator.training.attempt.log_file import output_to

    opened = [open_sweep(sweep, output) for sweep in sweeps]
    if answers is not None:
        from orchestrator.deploy.side_by_side import record_answers

        with output_to(Path(os.devnull)):
            for each in opened:
                record_answers(each, answers)
    if live:
        _serve([each.record for each in opened], port or 0, open_)
        return
    name = f"report.{format}" if format in ("html", "md") else "tables"
    target = to or opened[0].record.paths.root / name
    data = [read_data(each.record) for each in opened]
    try:
        files = write_report(data, target, format)
    except OSError as error:
        raise RequestError(f"{target}: cannot be written: {error}", "Name another file or folder with --to.") from error
    for file in files:
        print(file)
    if open_:
        import webbrowser

        webbrowser.open(files[0].resolve().as_uri())


def _serve(sweeps: "list[SweepRecord]", port: int, opens: bool) -> None:
    """Serve the live report until a signal."""
    from orchestrator.page.live import serve_report
    from orchestrator.remote.view import refreshing

    def ready(address: str) -> None:
        print(f"{address} shows the report to browsers on this machine; Ctrl-C ends it", flush=True)
        if opens:
            import webbrowser

            webbrowser.open(address)

    with until_signal(), ExitStack() as stack:
        for each in sweeps:
            stack.enter_context(refreshing(each))
        serve_report(sweeps, port, ready)
