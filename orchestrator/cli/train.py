"""Commands for experiments and sweeps: check, schema, data, trial, sweep, resume, status, board and demo."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.base_folder import as_stored
from orchestrator.cli.frame import (
    Address,
    File,
    Json,
    Name,
    Output,
    Seed,
    Set,
    Sweep,
    Where,
    app,
    console_on,
    now_and_then,
    print_json,
    show_best,
)
from orchestrator.errors import Interrupted, RequestError, SpecError, StorageError, TrialsFailedError
from orchestrator.signals import Signalled, raising_signals, signal_name
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.spec.scheduler_effect import require_scheduler_effect
from orchestrator.storage import storage_fault
from orchestrator.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.record import ExperimentSource, SweepPaths, SweepRecord


@app.command(epilog="Example: orchestrator check experiments/demo.yaml --set training.steps=100")
def check(file: File, set_: Set = None, as_json: Json = False) -> None:
    """Validate an experiment file and print its resolved fields."""
    spec = load_spec(file, set_ or [])
    try:
        require_scheduler_effect(spec)
    except SpecError as error:
        raise SpecError(
            str(error), "This concerns sweeps only; `orchestrator trial` has no scheduler and would run."
        ) from error
    if spec.data.require_stop and spec.base.eos_token is None and spec.data.lacks_stop_token:
        raise SpecError(
            "data.chat_template: no row ends with a stop token; nothing after an answer is in the loss",
            "Write a stop token there, such as {{ eos_token }}; or set data.require_stop: false.",
        )
    from orchestrator.training.model.check_targets import EmptyBases, check_targets, notes_on_size

    spec, notes = as_stored(spec, fetch=False)
    empty = EmptyBases()
    check_targets(spec, empty)
    notes += notes_on_size(spec, empty)
    document = spec.model_dump(mode="json")
    if spec.search.algorithm != "grid":  # a grid has its own number of trials, and its file must not give another
        document["search"]["num_trials"] = spec.search.total_trials
    document["search"]["mode"] = spec.search.resolved_mode
    from orchestrator.data.long_rows import note_on_max_length

    if note := note_on_max_length(spec.data, spec.base):
        notes.append(note)
    from orchestrator.planning.doubts import doubts_of

    notes += doubts_of(spec)
    if as_json:
        print_json(document)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return
    import yaml

    print(yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100), end="")
    for note in notes:
        print(f"# note: {note}")
    print(f"# valid: {counted(spec.search.total_trials, 'trial')}")


@app.command(epilog="Example: orchestrator schema > experiment.schema.json")
def schema() -> None:
    """Print the JSON Schema of experiment files, for editors."""
    from orchestrator.spec.manual.schema import spec_schema

    print_json(spec_schema())


@app.command(epilog="Example: orchestrator data experiments/demo.yaml --rows 5")
def data(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Experiment file (YAML), or a file or folder of rows (with the embedded base, or --set base.model).",
            show_default=False,
        ),
    ],
    rows: Annotated[int, typer.Option(metavar="N", min=0, help="Number of training rows to show.")] = 3,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model sees them, without training.

    Mark the tokens in the loss, and report lengths, truncated and dropped rows.
    """
    from orchestrator.data.infer_format import holds_rows, spec_of_rows
    from orchestrator.report.data import say_data
    from orchestrator.training.attempt.log_file import output_to

    spec = (spec_of_rows if holds_rows(file) else load_spec)(file, set_ or [])
    # Output of libraries, such as download progress, does not belong into the answer.
    with (
        os.fdopen(os.dup(1), "w", encoding="utf-8") as own,
        os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1) as progress,
        output_to(Path(os.devnull)),
    ):
        from orchestrator.data.preview import preview

        shown = preview(spec.data, spec.base, rows, now_and_then(lambda line: print(line, file=progress)))
        if as_json:
            print(json.dumps(shown.model_dump(mode="json"), indent=2, allow_nan=False), file=own)
        else:
            say_data(console_on(own), shown)


@app.command(epilog="Example: orchestrator trial experiments/demo.yaml --set training.steps=50")
def trial(file: File, set_: Set = None, name: Name = None, output: Output = None) -> None:
    """Run one trial on this machine, without Ray and without a search.

    Searched fields keep the values that the experiment gives outside `search`, or their defaults.
    """
    from orchestrator.record import read_sweep
    from orchestrator.record.new_sweep import claim_folder, source_of
    from orchestrator.report.live import TrialView

    spec = load_spec(file, set_ or [])
    with (
        claim_folder(spec, file.name, name, output) as paths,
        _resumable(paths.root),
        _screen(paths.root) as console,
    ):
        from orchestrator.training.local import run_local_trial

        with TrialView(console, f"trial in {paths.root}") as view:
            run_local_trial(spec, paths, view, source_of(file, set_ or []))
        show_best(console, read_sweep(paths.root))


@app.command(epilog="Example: orchestrator sweep experiments/demo.yaml --name first --seed 7")
def sweep(
    file: File,
    set_: Set = None,
    name: Name = None,
    seed: Seed = None,
    address: Address = None,
    output: Output = None,
) -> None:
    """Run a sweep on this machine or on a Ray cluster."""
    from orchestrator.record.new_sweep import claim_folder, source_of

    overrides = [*(set_ or []), *([] if seed is None else [f"search.seed={seed}"])]
    spec = load_spec(file, overrides)
    with claim_folder(spec, file.name, name, output) as paths:
        record = _sweep(spec, paths, address, source_of(file, overrides))
    _require_no_failures(record)


@app.command(epilog="Example: orchestrator resume runs/demo")
def resume(
    sweep: Sweep,
    trials: Annotated[
        int | None,
        typer.Option("--trials", metavar="N", min=1, help="New total number of trials; larger than the present one."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="LIMIT=V", help="Change a limit of search.budget, for example gpu_hours=20."),
    ] = None,
    address: Address = None,
    output: Where = "runs",
) -> None:
    """Continue a sweep after an interruption. Finished trials do not run again.

    The recorded experiment is used, even if its file has changed. Changes by --trials and --budget are recorded.
    """
    from orchestrator.record import read_sweep
    from orchestrator.record.extend import extend_sweep
    from orchestrator.report.live import SweepView, TrialView

    record = extend_sweep(read_sweep(sweep, output), trials, budget or [])
    with _resumable(record.paths.root), _screen(record.paths.root) as console:
        _say_changed_file(console, record)
        if record.info.is_single_trial:
            from orchestrator.training.local import resume_local_trial

            with TrialView(console, f"resuming the trial in {record.paths.root}") as trial_view:
                resume_local_trial(record, trial_view)
        else:
            from orchestrator.sweep import resume_sweep

            title = f"resuming the sweep in {record.paths.root}"
            with SweepView(console, record.info.num_trials, title) as view:
                resume_sweep(record, view.update, address, view.say)
            _show_trials(console, record)
        show_best(console, record)
    _require_no_failures(record)


@app.command(epilog="Example: orchestrator status runs/demo --json")
def status(sweep: Sweep, as_json: Json = False, output: Where = "runs") -> None:
    """Show a sweep's trials, best first."""
    from orchestrator.record import read_sweep

    record = read_sweep(sweep, output)
    trials, over = record.trials(), record.budget_spent()
    if as_json:
        search = record.info.spec.search
        print_json(
            {
                "sweep": record.paths.name,
                "folder": str(record.paths.root),
                "metric": search.metric,
                "mode": search.resolved_mode,
                "num_trials": record.info.num_trials,
                "budget_spent": over and over.model_dump(mode="json"),
                "trials": [trial.model_dump(mode="json") for trial in trials],
            }
        )
        return
    from orchestrator.report.tables import say_failures, trials_table
    from orchestrator.report.warnings import distinct_warnings

    console = console_on()
    console.print(trials_table(trials, title=f"{record.paths.name}: {len(trials)} of {record.info.num_trials} started"))
    if over:
        console.print(str(over), highlight=False)
    say_failures(console, trials)
    for warning, number in distinct_warnings(trials).values():
        console.print(f"warning ({counted(number, 'trial')}): {warning}", soft_wrap=True, highlight=False, markup=False)


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
    arguments = ["-m", "tensorboard.main", "--logdir", str(record.paths.tensorboard), "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *arguments])


@app.command(epilog="Example: orchestrator demo --name first")
def demo(
    name: Name = None,
    output: Output = None,
    set_: Set = None,
) -> None:
    """Run the embedded example, a sweep of 8 QLoRA trials.

    Then show answers of the base and of the best adapter side by side.
    """
    from orchestrator.deploy import FinishedSweep
    from orchestrator.embedded import EXPERIMENT
    from orchestrator.record.new_sweep import claim_folder, source_of
    from orchestrator.report.demo import show_side_by_side

    spec = load_spec(EXPERIMENT, set_ or [])
    with claim_folder(spec, "demo", name, output) as paths:
        record = _sweep(spec, paths, None, source_of(EXPERIMENT, set_ or []))
    with _screen(paths.root) as console:
        show_side_by_side(console, FinishedSweep(record))
        console.print(f"\nMore: orchestrator chat {paths.root} --compare-base", soft_wrap=True, highlight=False)
    _require_no_failures(record)


def _sweep(spec: SweepSpec, paths: "SweepPaths", address: str | None, source: "ExperimentSource") -> "SweepRecord":
    from orchestrator.report.live import SweepView

    with _resumable(paths.root), _screen(paths.root) as console:
        from orchestrator.sweep import run_sweep

        total = spec.search.total_trials
        with SweepView(console, total, f"sweep of {counted(total, 'trial')} in {paths.root}") as view:
            record = run_sweep(spec, paths, view.update, address, view.say, source)
        _show_trials(console, record)
        show_best(console, record)
    return record


def _say_changed_file(console: "Console", record: "SweepRecord") -> None:
    """Print how the experiment file differs from the recorded experiment, which is the one that continues."""
    from orchestrator.record.extend import changed_since

    if record.info.source is None or not (changes := changed_since(record.info)):
        return
    lines = [
        f"note: {record.info.source.file} has changed since the start; the sweep continues as recorded:",
        *(f"  {change}" for change in changes),
        "  (--trials N and --budget LIMIT=V change a sweep; for anything else start a new one)",
    ]
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _show_trials(console: "Console", record: "SweepRecord") -> None:
    """Print all trials, then the failed ones with their reasons."""
    from orchestrator.report.tables import say_failures, trials_table

    console.print(trials_table(record.trials()))
    say_failures(console, record.trials())


def _require_no_failures(record: "SweepRecord") -> None:
    """End the command with exit code 3 if trials of the sweep failed.

    Raises:
        TrialsFailedError: a trial of the sweep has failed.
    """
    from orchestrator.record import TrialState

    trials = record.trials()
    num_failed = sum(trial.state == TrialState.FAILED for trial in trials)
    if num_failed:
        raise TrialsFailedError(
            f"{num_failed} of {counted(len(trials), 'trial')} failed; the best adapter comes from the others",
            f"See the reasons with: orchestrator status {record.paths.root}",
        )


@contextmanager
def _screen(root: Path) -> Iterator["Console"]:
    """Yield a console for the command's own lines. Output of libraries goes to `driver.log` in the sweep's folder."""
    from orchestrator.training.attempt.log_file import output_to

    with tempfile.TemporaryDirectory() as folder, os.fdopen(os.dup(1), "w", encoding="utf-8") as own:
        log = Path(folder) / "driver.log"
        try:
            with output_to(log):
                yield console_on(own)
        finally:
            if (root / "sweep.json").is_file():  # otherwise nothing was started, and nothing is written
                # The command itself reports a full disk or a folder that cannot be written.
                with suppress(OSError), (root / "driver.log").open("ab") as kept:
                    kept.write(log.read_bytes())


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Turn a signal or a storage fault into an error that says how to resume, each with its own exit code."""

    def remedy() -> str:
        return f"Continue with: orchestrator resume {folder}" if (folder / "sweep.json").is_file() else ""

    try:
        with raising_signals():
            yield
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, Signalled) else Signals.SIGINT
        kept = "all measurements are kept" if remedy() else "nothing was started"
        raise Interrupted(f"interrupted by {signal_name(number)}; {kept}", remedy(), 128 + number) from None
    except OSError as error:
        if fault := storage_fault(error):
            raise StorageError(
                f"{folder}: its storage fails: {fault}", f"Free space or repair the storage. {remedy()}"
            ) from error
        raise
