"""Commands that steer a sweep: stop, pause, go-on, extend, add and clone."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.frame import Address, MoreTrials, NewBudget, Sweep, Trust, Where, app
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from orchestrator.record import SweepRecord
    from orchestrator.record.requests import Verb

Trial = Annotated[
    str,
    typer.Argument(
        metavar="TRIAL", help="A trial, as SWEEP/TRIAL: runs/demo/4f2a_00001; or its folder.", show_default=False
    ),
]
Values = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=v", help="Value of a field of the trial. Repeatable."),
]
Wait = Annotated[
    float, typer.Option("--wait", metavar="S", min=0, help="Seconds to wait for the answer of the sweep's driver.")
]


@app.command(epilog="Example: orchestrator stop runs/demo/4f2a_00001")
def stop(trial: Trial, wait: Wait = 60.0, output: Where = "runs") -> None:
    """Stop a trial of a running sweep at its next evaluation.

    Its adapter stays, and `best` may choose it. The search learns nothing from a trial that somebody has stopped.
    """
    _ask_about(trial, "stop", wait, output)


@app.command(epilog="Example: orchestrator pause runs/demo/4f2a_00001")
def pause(trial: Trial, wait: Wait = 60.0, output: Where = "runs") -> None:
    """Pause a trial of a running sweep at its next evaluation.

    It writes a checkpoint and gives its slot to another trial, until `go-on`. A sweep that is interrupted and resumed
    keeps it paused.
    """
    _ask_about(trial, "pause", wait, output)


@app.command(name="go-on", epilog="Example: orchestrator go-on runs/demo/4f2a_00001")
def go_on(trial: Trial, wait: Wait = 60.0, output: Where = "runs") -> None:
    """Have a paused trial train on, as soon as a slot is free."""
    _ask_about(trial, "go-on", wait, output)


@app.command(epilog="Example: orchestrator extend runs/demo --trials 20")
def extend(
    sweep_or_trial: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A sweep, running or finished; with --steps also a trial, as SWEEP/TRIAL.",
            show_default=False,
        ),
    ],
    trials: MoreTrials = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Train the best trial, or the given one, N steps longer: a warm clone of it."
        ),
    ] = None,
    budget: NewBudget = None,
    address: Address = None,
    trust: Trust = False,
    wait: Wait = 60.0,
    output: Where = "runs",
) -> None:
    """Give a sweep more trials or budget, or a trial more steps.

    A running sweep takes it up. If no driver is running, this command resumes the sweep itself.
    """
    from orchestrator.cli.train import resume
    from orchestrator.record import read_sweep
    from orchestrator.record.ask import ask
    from orchestrator.record.lock import driver_state

    if (trials is not None or bool(budget)) == (steps is not None):
        raise RequestError("extend: give --steps N, or --trials N and --budget LIMIT=V, which may be used together")
    if steps is not None:
        record, trial_id = _best_or_given(sweep_or_trial, output)
        print(ask(record, "clone", wait, trial_id=trial_id, warm=True, values=_longer(record, trial_id, steps)))
        if driver_state(record.paths).is_running:
            return
    else:
        record = read_sweep(sweep_or_trial, output)
        if driver_state(record.paths).is_running:
            print(ask(record, "extend", wait, num_trials=trials, budget=budget or []))
            return
    resume(str(record.paths.root), trials, budget, address, trust=trust, output=output)


@app.command(epilog="Example: orchestrator add runs/demo --set training.learning_rate=3e-4")
def add(sweep: Sweep, set_: Values = None, wait: Wait = 60.0, output: Where = "runs") -> None:
    """Add a trial with given values to a running sweep.

    Searched fields that are not given have the experiment's own values.
    """
    from orchestrator.record import read_sweep

    values = _parse(set_)
    if not values:
        raise RequestError("add: a trial needs values", "Give them: --set training.learning_rate=3e-4.")
    _ask(read_sweep(sweep, output), "add", wait, values=values)


@app.command(epilog="Example: orchestrator clone runs/demo/4f2a_00001 --set lora.rank=32 --warm")
def clone(
    trial: Trial,
    set_: Values = None,
    warm: Annotated[
        bool,
        typer.Option("--warm", help="Begin with the best adapter of the trial, running or ended; its rank may change."),
    ] = False,
    wait: Wait = 60.0,
    output: Where = "runs",
) -> None:
    """Add a trial with the values of another one, and some changed.

    With --warm it begins with the other trial's adapter instead of a new one. A higher rank keeps the update of the
    adapter exactly, a lower one its best approximation. Optimizer and schedule begin anew.
    """
    values = _parse(set_)
    if not values and not warm:
        raise RequestError("clone: the same trial would train again", "Change a value with --set, or give --warm.")
    _ask_about(trial, "clone", wait, output, values=values, warm=warm)


def _ask_about(trial: str, verb: "Verb", wait: float, output: str, **fields: Any) -> None:
    from orchestrator.record.find_trial import find_trial

    record, trial_id = find_trial(trial, output)
    if verb != "clone" and record.paths.trial(trial_id).result.is_file():
        raise RequestError(
            f"{trial_id}: the trial has ended already",
            f"`orchestrator clone {record.paths.root}/{trial_id} --warm` begins another one with its adapter.",
        )
    _ask(record, verb, wait, trial_id=trial_id, **fields)


def _ask(record: "SweepRecord", verb: "Verb", wait: float, **fields: Any) -> None:
    from orchestrator.record.ask import ask

    print(ask(record, verb, wait, **fields))


def _best_or_given(sweep_or_trial: str, output: str) -> tuple["SweepRecord", str]:
    """Return a sweep and the trial to train longer: the given one, or the recommended one; the leader while it runs."""
    from orchestrator.deploy import FinishedSweep
    from orchestrator.errors import RecordError
    from orchestrator.record import read_sweep
    from orchestrator.record.find_trial import find_trial

    try:
        record = read_sweep(sweep_or_trial, output)
    except RecordError:
        if "/" not in sweep_or_trial.strip("/"):
            raise
        return find_trial(sweep_or_trial, output)
    if record.finished():
        return record, FinishedSweep(record).best().trial.trial_id
    leader = next((trial for trial in record.trials() if trial.best is not None), None)
    if leader is None:
        raise RequestError(f"{record.paths.root}: no trial has an adapter yet", "Wait for a first evaluation.")
    return record, leader.trial_id


def _longer(record: "SweepRecord", trial_id: str, steps: int) -> dict[str, Any]:
    from orchestrator.record import read_trial

    by_epochs = read_trial(record.paths.trial(trial_id), record.info).config.training.epochs is not None
    return {"training.steps": steps} | ({"training.epochs": None} if by_epochs else {})


def _parse(written: list[str] | None) -> dict[str, Any]:
    from orchestrator.spec.load import parse_values

    return parse_values(written or [])
