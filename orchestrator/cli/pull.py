"""The command that copies a sweep from an object store: pull."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.frame import Sweep, Where, app
from orchestrator.errors import RequestError


@app.command(epilog="Example: orchestrator pull s3://bucket/runs/demo --to runs/demo")
def pull(
    sweep: Sweep,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="A new folder, or one into which it was pulled before. Default: runs/NAME."
        ),
    ] = None,
    adapters: Annotated[
        Literal["best", "all", "none"],
        typer.Option(metavar="best|all|none", help="Adapters to copy: the recommended one, those of all trials, none."),
    ] = "best",
    rows: Annotated[bool, typer.Option("--rows", help="Also copy the tokenized rows.")] = False,
    output: Where = "runs",
) -> None:
    """Copy a sweep from an object store into a folder.

    Its records are copied, and the adapter that `best` recommends. The same command again copies what has changed
    since.
    """
    from orchestrator.remote.location import find_uri

    uri = find_uri(sweep, output)
    if uri is None:
        raise RequestError(
            f"{sweep}: is no URI", "Give the URI of a sweep, such as s3://BUCKET/FOLDER/NAME, or its name and --output."
        )
    from orchestrator.deploy.pulled import pull_sweep

    folder = to or Path("runs") / uri.rpartition("/")[2]
    for line in pull_sweep(uri, folder, adapters, rows):
        print(line)
