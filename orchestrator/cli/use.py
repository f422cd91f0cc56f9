"""Verbs for what leaves a sweep: choose, ask, check, publish."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.frame import Json, Sweep, SweepOrAdapter, Trust, Where, app, console_on, print_json, say_rows
from orchestrator.errors import RequestError

_DEFAULT_DTYPE = "fp16 where base.compute_dtype is float16, else bf16"


@app.command(epilog="Example: orchestrator best runs/demo --metric eval/loss --metric size")
def best(
    sweep: Sweep,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Choose by this metric; several give the Pareto set (`size`: parameters of the adapter)."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="The best value, however small its lead.")] = False,
    top: Annotated[int | None, typer.Option(metavar="K", min=1, help="Show the best K finished trials too.")] = None,
    as_json: Json = False,
    export: Annotated[Path | None, typer.Option(help="Copy the adapter, a complete PEFT folder, to here.")] = None,
    output: Where = "runs",
) -> None:
    """Show the adapter to take, and why: the smallest of those that cannot be told apart from the best."""
    from orchestrator.deploy import open_sweep
    from orchestrator.report.best import say_best
    from orchestrator.report.tables import trials_table

    opened, metrics = open_sweep(sweep, output), metric or []
    winner = opened.best(metrics[0] if metrics else None, strict)
    front = opened.pareto(metrics) if len(metrics) > 1 else []
    leaders = opened.top(top, winner.recommendation.metric) if top else []
    if export is not None:
        from orchestrator.deploy.export.export import export as export_bundle

        with _progress() as say:
            export_bundle(winner.adapter_ref(), export, "adapter", say=say)
    if as_json:
        lists = {"top": leaders, "pareto": front}
        named = {name: [trial.model_dump(mode="json") for trial in trials] for name, trials in lists.items() if trials}
        print_json(winner.as_dict() | named | ({"exported": str(export.resolve())} if export else {}))
        return
    console = console_on()
    for title, trials in ((f"the best {top}", leaders), (f"Pareto set by {', '.join(metrics)}", front)):
        if trials:
            console.print(trials_table(trials, title, sizes=True))
    say_rows(console, opened.record)
    say_best(console, winner)
    if export is not None:
        console.print(f"exported to {export}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: orchestrator evaluate runs/demo --as adapter,merged --metrics loss,exact_match")
def evaluate(
    sweep_or_adapter: SweepOrAdapter,
    as_: Annotated[
        str | None,
        typer.Option("--as", help="adapter, adapter-16bit, merged, merged-original, merged-4bit; default all."),
    ] = None,
    metrics: Annotated[str, typer.Option(help="loss, perplexity, exact_match, rouge, bleu.")] = "loss,perplexity",
    data: Annotated[
        Path | None,
        typer.Option(help="Rows (file, folder or glob, columns of the training file); default the held-out ones."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    top: Annotated[
        int, typer.Option(metavar="K", min=1, help="The best K trials of a sweep, and the one it recommends.")
    ] = 3,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Type of the 16-bit forms: bf16 or fp16; default {_DEFAULT_DTYPE}."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness.")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="Folder of further tasks (YAML).")] = None,
    as_json: Json = False,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Score finalists in the forms that ship, against the adapter as it was trained. Lists have commas."""
    from orchestrator.deploy.dtypes import DTYPES
    from orchestrator.deploy.find import is_adapter
    from orchestrator.deploy.scoring import evaluate as room
    from orchestrator.deploy.scoring.forms import FORMS
    from orchestrator.deploy.scoring.harness import open_harness
    from orchestrator.deploy.scoring.metrics import METRICS, require_packages
    from orchestrator.report.evaluation import evaluation_table

    forms = room.pick(as_, FORMS, "--as") if as_ is not None else None
    measured = room.pick(metrics, METRICS, "--metrics")
    kind = DTYPES[room.pick(dtype, list(DTYPES), "--dtype")[0]] if dtype is not None else None
    require_packages(measured)
    if tasks is None and tasks_folder is not None:
        raise RequestError(f"--tasks-folder {tasks_folder}: no task is asked for", "Name some of it by --tasks.")
    subjects = room.find_finalists(sweep_or_adapter, output, top, trust)
    first = subjects[0]
    keep = None if is_adapter(sweep_or_adapter) or first.sweep is None else room.new_report(first.sweep)
    with _progress() as say:
        found = room.rows_of_file(first, data, rows) if data else room.own_rows(first, rows)
        names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
        harness = open_harness(names, tasks_folder, rows) if names else None
        report = room.evaluate(subjects, found, measured, forms, kind, harness, keep, say)
    if as_json:
        print_json(json.loads(report.model_dump_json()))
        return
    console = console_on()
    console.print(evaluation_table(report))
    if keep is not None and keep.is_file():
        console.print(f"kept in {keep}", soft_wrap=True, highlight=False)


@app.command(epilog='Example: orchestrator chat runs/demo --compare-base --prompt "What is the total of 12 and 45?"')
def chat(
    sweep_or_adapter: SweepOrAdapter,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A question, each by itself; may be repeated. Default: ask for them.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .txt or .jsonl file of questions; needs --answers.")] = None,
    answers: Annotated[Path | None, typer.Option(help="New JSONL file for the answers to --prompts.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, for adapters trained on messages.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Draw tokens; 0 takes the likeliest each time.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Draw from this share of likeliest tokens.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the same each time.")] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Let the base answer too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 256,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Ask the best adapter; answers are streamed. Typed questions follow each other: /clear forgets, /quit ends."""
    from orchestrator.deploy.chat import Conversation, open_chat, open_prompt_form, sampling_of
    from orchestrator.deploy.find import find_adapter
    from orchestrator.deploy.prompts import new_file, read_prompts, write_answers
    from orchestrator.training.attempt.log_file import output_to

    sampling = sampling_of(temperature, top_p, top_k, seed)
    if (prompts is None) != (answers is None) or (prompts and prompt):
        raise RequestError("--prompts FILE and --answers FILE belong together, without --prompt")
    subject = find_adapter(sweep_or_adapter, output, trust)
    with output_to(Path(os.devnull)):  # what libraries print while they load; faults are raised
        form = open_prompt_form(subject, system)
    if prompts is not None and answers is not None:
        asked = read_prompts(prompts, form)
        batch_size = subject.config.training.eval_batch_size if subject.config else 8
        with new_file(answers) as file:
            with output_to(Path(os.devnull)):
                session = open_chat(subject, form)
            for done in write_answers(session, asked, file, max_new_tokens, batch_size, sampling, compare_base):
                print(f"{done} of {len(asked)} answered", flush=True)
        return
    with output_to(Path(os.devnull)):
        session = open_chat(subject, form)
    sides = {"base   > ": Conversation(session, base_only=True), "adapter> ": Conversation(session)}
    for question in prompt or _questions():
        for label, side in sides.items() if compare_base else [("", sides["adapter> "])]:
            if prompt or question == "/clear":
                side.clear()
            if question == "/clear":
                continue
            print(label, end="")
            for piece in side.ask(question, max_new_tokens, sampling):
                print(piece, end="", flush=True)
            print()


@app.command(epilog="Example: orchestrator export runs/demo --to merged --format merged --dtype bf16")
def export(
    sweep_or_adapter: SweepOrAdapter,
    to: Annotated[Path, typer.Option(help="Folder that does not exist yet.")],
    format: Annotated[
        Literal["adapter", "merged", "gguf", "ray-serve"],
        typer.Option(help="PEFT folder; one model; that as llama.cpp's file, or with Ray Serve LLM's config file."),
    ] = "adapter",
    dtype: Annotated[
        Literal["bf16", "fp16"] | None, typer.Option(help=f"Type of merged weights; default {_DEFAULT_DTYPE}.")
    ] = None,
    onto: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(help="Merge into the weights it was trained on (default), or the base's original ones."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows to compare on (file, folder or glob); default the held-out ones.")
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Export the best adapter, load it back, and hold it against its source."""
    from orchestrator.deploy.export.export import export as export_bundle
    from orchestrator.deploy.find import find_adapter

    subject = find_adapter(sweep_or_adapter, output, trust)
    with _progress() as say:
        done = export_bundle(subject, to, format, dtype, onto, data, say)
    if as_json:
        print_json(done.as_dict())
    else:
        print(f"exported to {to}: {len(done.files)} files, {done.num_bytes:,} bytes")


@app.command(epilog="Example: orchestrator verify adapter")
def verify(
    folder: Annotated[Path, typer.Argument(help="An adapter, or what `export` has made.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check every byte of a bundle against its manifest."""
    from orchestrator.adapters.bundle import verify as verify_bundle

    manifest = verify_bundle(folder)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    facts = manifest.facts
    of_trial = f" of trial {facts.trial_id}, step {facts.step}" if facts.trial_id else ""
    print(f"{folder}: whole: {len(manifest.files) + 1} files, {facts.format}{of_trial}, base {facts.base['model']}")


@app.command(epilog="Example: orchestrator push adapter --repo me/my-adapter --private --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(help="An adapter, or what `export` has made.", show_default=False)],
    repo: Annotated[str, typer.Option(help="Model repo: owner/name, or a name of the token's owner.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repo private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, without network.")] = False,
) -> None:
    """Publish a bundle on the hub, in one commit. The token is HF_TOKEN's, or that of `hf auth login`."""
    from orchestrator.deploy.export.push import push as push_bundle

    push_bundle(folder, repo, private, dry_run, say=lambda line: print(line, flush=True))


@app.command(epilog="Example: orchestrator serve runs/demo --top 3 --port 8000")
def serve(
    sweep_or_adapter: SweepOrAdapter,
    engine: Annotated[
        Literal["auto", "vllm", "transformers"],
        typer.Option(help="auto: vLLM where it is installed and can serve this, else transformers."),
    ] = "auto",
    top: Annotated[int, typer.Option(metavar="K", min=1, help="The best K adapters of a sweep, side by side.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on; any but the loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="ORCHESTRATOR_TOKEN", show_envvar=True, help="That requests bear; best by the variable."),
    ] = None,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Answer over HTTP as OpenAI's API does, until Ctrl-C."""
    from orchestrator.deploy.serving.serve import plan_service, run_service
    from orchestrator.training.attempt.log_file import output_to

    service = plan_service(sweep_or_adapter, output, top, engine, host, port, token, trust)
    run_service(service, lambda text: print(text, flush=True), output_to(Path(os.devnull)))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says lines on the other stream than --json has. What libraries print meanwhile is dropped; faults are raised."""
    from orchestrator.training.attempt.log_file import output_to

    with os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1) as own, output_to(Path(os.devnull)):
        yield lambda line: print(line, file=own)


def _questions() -> Iterator[str]:
    """Lines from standard input, with a prompt where a person types them."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line
