"""The command that frees disk: clean."""

import sys
from typing import Annotated

import typer

from orchestrator.cli.frame import Where, app
from orchestrator.errors import RequestError
from orchestrator.words import counted


@app.command(epilog="Example: orchestrator clean runs/demo --keep 3 --dry-run")
def clean(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP...", help="Sweeps to clean.", show_default=False)],
    keep: Annotated[
        int, typer.Option("--keep", metavar="K", min=1, help="Number of best trials whose adapters stay.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    output: Where = "runs",
) -> None:
    """Free the disk of what ended sweeps no longer need.

    Removes checkpoints of ended trials, and the weights of adapters once the sweep has ended. The adapters of the K
    best trials stay, and of each trial that `best` may choose, that was tested, repeated or audited. Metrics and scores
    of rows stay of all.
    """
    from orchestrator.deploy.clean import clean, what_to_free
    from orchestrator.record import read_sweep

    plans = [(record, what_to_free(record, keep)) for record in (read_sweep(sweep, output) for sweep in sweeps)]
    for record, freed in plans:
        size, number = counted(freed.num_bytes, "byte"), counted(len(freed.files), "file")
        print(f"{record.paths.root}: {number}, {size}; adapters of {counted(len(freed.adapters), 'trial')}")
        if freed.why_adapters_stay:
            print(f"{record.paths.root}: adapters stay: {freed.why_adapters_stay}")
    plans = [(record, freed) for record, freed in plans if freed.files]
    if dry_run or not plans:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise RequestError("clean: nobody can be asked, because the input is not a terminal", "Give --yes.")
        if not typer.confirm("Remove these files?"):
            return
    for record, freed in plans:
        num_bytes = freed.num_bytes
        clean(record, keep, freed)
        print(f"{record.paths.root}: freed {counted(num_bytes, 'byte')}")
