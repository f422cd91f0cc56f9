"""Commands for experiments and sweeps: check, schema, data, trial, sweep, resume and demo."""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.base_folder import as_stored, require_trusted_code
from orchestrator.cli.frame import (
    Address,
    File,
    Json,
    MoreTrials,
    Name,
    NewBudget,
    Output,
    Seed,
    Set,
    Submit,
    Sweep,
    Trust,
    TrustState,
    WarmFrom,
    Where,
    app,
    console_on,
    now_and_then,
    print_json,
    show_best,
    table_lines,
)
from orchestrator.cli.screen import resumable, screen
from orchestrator.errors import SpecError, TrialsFailedError
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.spec.scheduler_effect import require_scheduler_effect
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
    from orchestrator.training.engines.check_targets import EmptyBases, check_targets, notes_on_size

    spec, notes = as_stored(spec, fetch=False)
    empty = EmptyBases()
    check_targets(spec, empty)
    notes += notes_on_size(spec, empty)
    if spec.evaluation.own:
        from orchestrator.adapters.row_metrics import try_own_metrics
        from orchestrator.data.preview import first_example

        example = first_example(spec.data, spec.base)
        try_own_metrics(spec.evaluation.own, example.prompt, example.answer)
    document = spec.model_dump(mode="json")
    metrics = [each if isinstance(each, str) else each.written for each in spec.evaluation.metrics]
    document["evaluation"]["metrics"] = metrics
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
    total = counted(spec.search.total_trials, "trial")
    print(
        f"# valid: at most {total}, as search.stop may end the sweep"
        if spec.search.stop.is_set
        else f"# valid: {total}"
    )


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
    from orchestrator.record.new_sweep import source_of
    from orchestrator.remote.output import new_sweep
    from orchestrator.report.trial_view import TrialView

    spec = load_spec(file, set_ or [])
    with (
        new_sweep(spec, file.name, name, output) as paths,
        resumable(paths.root),
        screen(paths.root) as console,
    ):
        with TrialView(console, f"trial in {paths.root}") as view:
            view.doing("importing libraries, reading the data, loading the base")
            from orchestrator.training.local import run_local_trial

            run_local_trial(spec, paths, view, source_of(file, set_ or []))
        show_best(console, read_sweep(paths.root))


@app.command(epilog="Example: orchestrator sweep experiments/demo.yaml --warm-from runs/first")
def sweep(
    file: File,
    set_: Set = None,
    name: Name = None,
    seed: Seed = None,
    warm_from: WarmFrom = None,
    address: Address = None,
    submit: Submit = None,
    output: Output = None,
) -> None:
    """Run a sweep on this machine or on a Ray cluster."""
    from orchestrator.record.new_sweep import source_of
    from orchestrator.remote.output import new_sweep
    from orchestrator.remote.view import view_sweep

    overrides = [*(set_ or []), *([] if seed is None else [f"search.seed={seed}"])]
    spec = load_spec(file, overrides)
    if submit is not None:
        from orchestrator.cli.submit import submitted_sweep

        submitted_sweep(spec, file.name, name, output, warm_from or [], address, submit)
        return
    earlier = [view_sweep(each, output or spec.output.folder) for each in warm_from or []]
    with new_sweep(spec, file.name, name, output) as paths:
        record = _sweep(spec, paths, address, source_of(file, overrides), earlier)
    _require_no_failures(record)


@app.command(epilog="Example: orchestrator resume runs/demo")
def resume(
    sweep: Sweep,
    trials: MoreTrials = None,
    budget: NewBudget = None,
    address: Address = None,
    submit: Submit = None,
    trust: Trust = False,
    trust_state: TrustState = False,
    output: Where = "runs",
) -> None:
    """Continue a sweep after an interruption. Finished trials do not run again.

    The recorded experiment is used, even if its file has changed. Changes by --trials and --budget are recorded.
    """
    from orchestrator.record import is_finished, planned_trials
    from orchestrator.record.extend import extend_sweep
    from orchestrator.remote.output import send_rest, sweep_to_resume
    from orchestrator.report.live import SweepView
    from orchestrator.report.trial_view import TrialView

    if submit is not None:
        from orchestrator.cli.submit import submitted_resume

        submitted_resume(sweep, output, trials, budget or [], trust, trust_state, address, submit)
        return
    found = sweep_to_resume(sweep, output)
    record = extend_sweep(found, trials, budget or [])
    if record == found and is_finished(record):
        _repair_finished(record)
        send_rest(record, print)
        _show_finished(record)
        return
    require_trusted_code(record.info.spec.base, str(record.paths.root), trust)
    with resumable(record.paths.root), screen(record.paths.root) as console:
        _say_changed_file(console, record)
        if record.info.is_single_trial:
            with TrialView(console, f"resuming the trial in {record.paths.root}") as trial_view:
                trial_view.doing("importing libraries, loading the base")
                from orchestrator.training.local import resume_local_trial

                resume_local_trial(record, trial_view)
        else:
            title = f"resuming the sweep in {record.paths.root}"
            planned = partial(planned_trials, record.paths, record.info.num_trials)
            has_ended = record.paths.search_ended.is_file
            with SweepView(console, record.info.spec, planned, title, has_ended) as view:
                view.doing("importing libraries")
                from orchestrator.sweep import resume_sweep

                resume_sweep(record, view.update, address, view.say, view.doing, trust_state)
            _show_trials(console, record)
        show_best(console, record)
    _require_no_failures(record)


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
    from orchestrator.record.new_sweep import source_of
    from orchestrator.remote.output import new_sweep
    from orchestrator.report.demo import show_side_by_side

    spec = load_spec(EXPERIMENT, set_ or [])
    with new_sweep(spec, "demo", name, output) as paths:
        record = _sweep(spec, paths, None, source_of(EXPERIMENT, set_ or []))
    with screen(paths.root) as console:
        console.print("loading the base and the best adapter ...", highlight=False)
        show_side_by_side(console, FinishedSweep(record))
        console.print(f"\nMore: orchestrator chat {paths.root} --compare-base", soft_wrap=True, highlight=False)
    _require_no_failures(record)


def _sweep(
    spec: SweepSpec,
    paths: "SweepPaths",
    address: str | None,
    source: "ExperimentSource",
    warm_from: "Sequence[SweepRecord]" = (),
) -> "SweepRecord":
    from orchestrator.record import planned_trials
    from orchestrator.report.live import SweepView

    with resumable(paths.root), screen(paths.root) as console:
        total = spec.search.total_trials
        title = f"sweep of {counted(total, 'trial')} in {paths.root}"
        planned = partial(planned_trials, paths, total)
        with SweepView(console, spec, planned, title, paths.search_ended.is_file) as view:
            view.doing("importing libraries")
            from orchestrator.sweep import run_sweep

            record = run_sweep(spec, paths, view.update, address, view.say, source, warm_from, view.doing)
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


def _repair_finished(record: "SweepRecord") -> None:
    """Repair damaged files of a sweep of which nothing is left to run, and print them."""
    from orchestrator.record import find_damage
    from orchestrator.record.lock import only_driver
    from orchestrator.record.manifest import folder_fault

    def say(line: str) -> None:
        console_on().print(line, soft_wrap=True, highlight=False, markup=False)

    has_bad_rows = record.paths.data.exists() and folder_fault(record.paths.data)
    if has_bad_rows or any(damage.repair for damage in find_damage(record)):
        from orchestrator.training.start import repair_sweep

        with only_driver(record.paths):
            repair_sweep(record, say)


def _show_finished(record: "SweepRecord") -> None:
    """Print the result of a sweep of which nothing is left to run."""
    console = console_on()
    _say_changed_file(console, record)
    line = f"{record.paths.root}: is finished; nothing is left to run"
    console.print(line, soft_wrap=True, highlight=False, markup=False)
    if not record.info.is_single_trial:
        _show_trials(console, record)
    show_best(console, record)
    _require_no_failures(record)


def _show_trials(console: "Console", record: "SweepRecord") -> None:
    """Print the trials, as many as a terminal shows at once; then the failed ones with their reasons."""
    from orchestrator.report.tables import TrialsTable, axes_of, say_failures

    trials = record.trials()
    max_lines = table_lines(console)
    console.print(TrialsTable(trials, axes=axes_of(record.info.spec), max_lines=max_lines))
    if max_lines is not None and len(trials) > max_lines:
        line = f"all trials: orchestrator status {record.paths.root}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    say_failures(console, trials)


def _require_no_failures(record: "SweepRecord") -> None:
    """End the command with exit code 3 if trials of the sweep failed.

    Raises:
        TrialsFailedError: a trial of the sweep has failed.
    """
    from orchestrator.record import TrialState, repeats_record

    repeats = repeats_record(record)
    trials = record.trials() + (repeats.trials() if repeats else [])
    num_failed = sum(trial.state == TrialState.FAILED for trial in trials)
    if num_failed:
        raise TrialsFailedError(
            f"{num_failed} of {counted(len(trials), 'trial')} failed; the best adapter comes from the others",
            f"See the reasons with: orchestrator status {record.paths.root}",
        )
