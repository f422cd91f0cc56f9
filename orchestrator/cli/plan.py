"""The command `plan`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.frame import File, Json, Set, app, console_on, now_and_then
from orchestrator.errors import RequestError
from orchestrator.spec import load_spec
from orchestrator.words import counted


@app.command(epilog="Example: orchestrator plan experiments/demo.yaml --gpu h200 --gpus 2 --price 3")
def plan(
    file: File,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU", help="h200, h100, h100-pcie, a100-80, a100-40, l40s, a10 or l4. Default: this one."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="Number of GPUs.")] = 1,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure 3 steps of the largest and the smallest trial on this machine.")
    ] = False,
    price: Annotated[float | None, typer.Option(metavar="X", min=0, help="Price of a GPU hour in USD.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Foresee a sweep: memory, time, GPU hours, price, disk.

    Nothing is trained without --probe. Exit code 2 if some trials cannot fit into memory and are not dropped
    (`search.skip_unfit`).
    """
    from orchestrator.planning.gpus import find_gpu

    wanted = None if gpu is None else find_gpu(gpu)
    if probe and wanted is not None:
        raise RequestError(f"--probe measures on this machine, but --gpu is {gpu}", "Give one of the two.")
    spec = load_spec(file, set_ or [])
    from orchestrator.training.attempt.log_file import output_to

    # Output of libraries, such as download progress, does not belong into the answer.
    with (
        os.fdopen(os.dup(1), "w", encoding="utf-8") as own,
        os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1) as progress,
        output_to(Path(os.devnull)),
    ):
        from orchestrator.base_folder import as_stored
        from orchestrator.planning.gpus import budget_here, gpu_here
        from orchestrator.planning.probe import probe_corners
        from orchestrator.planning.sweep_plan import plan_sweep
        from orchestrator.report.plan import say_plan

        spec, stored = as_stored(spec)
        budget = None
        if wanted is None and (wanted := gpu_here()) is not None:
            budget = budget_here()
        say = now_and_then(lambda line: print(line, file=progress))
        found = plan_sweep(spec, file.name, wanted, gpus, budget=budget, price=price, say=say)
        found = found.model_copy(update={"notes": [*stored, *found.notes]})
        if probe:
            print("measuring steps on this machine", file=progress)
            found = probe_corners(spec, found)
        if as_json:
            print(found.model_dump_json(indent=2), file=own)
        else:
            say_plan(console_on(own), found)
    if (unfit := found.unfit) and not spec.search.skip_unfit:
        raise RequestError(
            f"{file}: {counted(len(unfit), 'kind')} of trials cannot fit into the memory of an {found.device}, "
            f"such as {unfit[0].name}",
            "Take these values out of search, set search.skip_unfit=true to have such points dropped, lower "
            "data.max_length, or use a larger GPU.",
        )
