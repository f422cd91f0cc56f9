"""Commands for the library of priors: what earlier sweeps of a team found, by base and data."""

from typing import Annotated

import typer

from orchestrator.cli.frame import Json, Where, app, console_on, print_json

priors = typer.Typer(
    help="Keep the best values of finished sweeps, where later ones begin.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(priors, name="priors")

Library = Annotated[
    str | None,
    typer.Option(
        "--file",
        metavar="PATH",
        help="The library (YAML). Default: $ORCHESTRATOR_PRIORS, else orchestrator/priors.yaml in the user's "
        "configuration folder.",
        show_default=False,
    ),
]


@priors.command(epilog="Example: orchestrator priors add runs/first --file priors.yaml")
def add(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP", help="Finished sweeps.", show_default=False)],
    file: Library = None,
    output: Where = "runs",
) -> None:
    """Add the best values of finished sweeps. A sweep that is added again replaces its row."""
    from orchestrator.priors.library import add_rows, change_library, library_path, row_of
    from orchestrator.remote.view import view_sweep

    path = library_path(file)
    new = [row_of(view_sweep(sweep, output)) for sweep in sweeps]
    change_library(path, lambda rows: add_rows(rows, new))
    for row in new:
        print(f"{path}: {row.sweep}: learning rate {row.rate:.3g}, rank {row.rank} for {row.kin}")


@priors.command("list", epilog="Example: orchestrator priors list --json")
def list_(file: Library = None, as_json: Json = False) -> None:
    """Show the rows of the library."""
    from rich.table import Table

    from orchestrator.priors.library import library_path, read_library

    path = library_path(file)
    rows = read_library(path)
    if as_json:
        print_json({"file": str(path), "rows": [row.model_dump() for row in rows]})
        return
    table = Table(title=f"{path}: {len(rows)} sweeps")
    for name in ("base", "width", "data", "rate", "rank", "spread", "trials", "sweep", "date"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row.family, str(row.width), row.data, f"{row.rate:.3g}", str(row.rank), f"x{row.spread:.3g}",
            str(row.trials), row.sweep, row.date,
        )  # fmt: skip
    console_on().print(table)


@priors.command(epilog="Example: orchestrator priors remove first")
def remove(
    sweeps: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Names of sweeps in the library.", show_default=False)
    ],
    file: Library = None,
) -> None:
    """Remove the rows of sweeps."""
    from orchestrator.priors.library import change_library, library_path, remove_rows

    path = library_path(file)
    change_library(path, lambda rows: remove_rows(rows, sweeps))
    print(f"{path}: removed {', '.join(sweeps)}")
