"""The command that checks what a sweep's scheduler has stopped."""

from typing import Annotated

import typer

from orchestrator.cli.frame import Address, Json, Sweep, Trust, TrustState, Where, app, print_json
from orchestrator.cli.screen import resumable, screen
from orchestrator.errors import OrchestratorError
from orchestrator.words import counted


@app.command(epilog="Example: orchestrator audit runs/demo --trials 4")
def audit(
    sweep: Sweep,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials", metavar="K", min=1, help="Number of stopped trials to finish. Default: 8, or all of fewer."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the sample. Another one finishes other trials.")
    ] = 0,
    address: Address = None,
    trust: Trust = False,
    trust_state: TrustState = False,
    as_json: Json = False,
    output: Where = "runs",
) -> None:
    """Finish some stopped trials, and count those that would have won.

    The trials are a random sample of those that the scheduler has stopped. They run anew from their first step,
    because a stopped trial keeps no checkpoint, in the folder `audit` of the sweep. The sweep's own records and its
    best adapter stay as they are. The same command continues an interrupted audit, and shows one that has ended.
    """
    from orchestrator.base_folder import require_trusted_code
    from orchestrator.record import read_sweep
    from orchestrator.report.audit import say_audit
    from orchestrator.report.live import SweepView
    from orchestrator.sweep.audit import begin_audit, find

    record = read_sweep(sweep, output)
    require_trusted_code(record.info.spec.base, str(record.paths.root), trust)
    begun = begin_audit(record, trials, seed)
    command = " ".join(
        ["orchestrator audit", str(record.paths.root), f"--trials {begun.info.num_trials} --seed {seed}"]
    )
    with resumable(begun.paths.root, command), screen(begun.paths.root, 2 if as_json else 1) as console:
        from orchestrator.sweep import finish_audit

        title = f"audit of {counted(begun.info.num_trials, 'stopped trial')} in {begun.paths.root}"
        with SweepView(console, begun.info.spec, lambda: begun.info.num_trials, title) as view:
            try:
                finish_audit(record, begun, view.update, address, view.say, trust_state)
            except OrchestratorError as error:
                # `resume` would run the same trials, but neither hold the sweep nor say what the audit has found.
                error.remedy = error.remedy.replace(f"orchestrator resume {begun.paths.root}", command)
                raise
        found = find(record, begun, seed)
        if not as_json:
            say_audit(console, found)
    if as_json:
        print_json(found.as_dict())
