"""Commands that use a sweep's adapters: best, evaluate, chat, export, verify, push and serve."""

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

Bundle = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="An adapter folder, an export, or a sweep (its best adapter is used).", show_default=False
    ),
]

_DEFAULT_DTYPE = "fp16 if base.compute_dtype is float16, else bf16"


@app.command(epilog="Example: orchestrator best runs/demo --metric eval/loss --metric size")
def best(
    sweep: Sweep,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC",
            help="Choose by this metric; several print the Pareto set (size: the adapter's parameters).",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Choose the best value, however small its lead.")] = False,
    top: Annotated[int | None, typer.Option(metavar="K", min=1, help="Also show the best K finished trials.")] = None,
    as_json: Json = False,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy the adapter, a complete PEFT folder, to this folder.")
    ] = None,
    output: Where = "runs",
) -> None:
    """Recommend an adapter, and show why.

    The recommended adapter is the smallest one whose score cannot be distinguished from the best.
    """
    from orchestrator.deploy import open_sweep
    from orchestrator.report.best import say_best
    from orchestrator.report.tables import TrialsTable, axes_of

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
    for title, trials in ((f"best {top} trials", leaders), (f"Pareto set by {', '.join(metrics)}", front)):
        if trials:
            console.print(TrialsTable(trials, title, axes_of(opened.record.info.spec), with_sizes=True))
    say_rows(console, opened.record)
    say_best(console, winner)
    if export is not None:
        console.print(f"exported to {export}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: orchestrator evaluate runs/demo --as adapter,merged")
def evaluate(
    sweep_or_adapter: SweepOrAdapter,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="FORMS",
            help="Forms to score, separated by commas: adapter, adapter-16bit, merged, merged-original, merged-4bit. "
            "Default: all.",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="METRICS", help="Metrics, separated by commas: loss, perplexity, exact_match, rouge, bleu."
        ),
    ] = "loss,perplexity",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows to score on (file, folder or glob with the training columns). Default: held-out rows.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use only this many rows, the first ones.")
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="K", min=1, help="Score the best K trials of a sweep and the recommended one.")
    ] = 3,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="bf16|fp16", help=f"Type of the 16-bit forms. Default: {_DEFAULT_DTYPE}."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Also run these tasks of lm-evaluation-harness, separated by commas."),
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with your own task files (YAML).")
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Score the best adapters in the forms that can be exported.

    Each form is compared with the adapter as trained.
    """
    from orchestrator.deploy.dtypes import DTYPES
    from orchestrator.deploy.find import is_adapter
    from orchestrator.deploy.scoring import evaluate as scoring
    from orchestrator.deploy.scoring.forms import FORMS
    from orchestrator.deploy.scoring.harness import open_harness
    from orchestrator.deploy.scoring.metrics import METRICS, require_packages
    from orchestrator.report.evaluation import evaluation_table

    forms = scoring.pick(as_, FORMS, "--as") if as_ is not None else None
    measured = scoring.pick(metrics, METRICS, "--metrics")
    kind = DTYPES[scoring.pick(dtype, list(DTYPES), "--dtype")[0]] if dtype is not None else None
    require_packages(measured)
    if tasks is None and tasks_folder is not None:
        raise RequestError(f"--tasks-folder {tasks_folder}: no task is given", "Name tasks of the folder with --tasks.")
    finalists = scoring.find_finalists(sweep_or_adapter, output, top, trust)
    first = finalists[0]
    keep = None if is_adapter(sweep_or_adapter) or first.sweep is None else scoring.new_report(first.sweep)
    with _progress() as say:
        found = scoring.rows_of_file(first, data, rows) if data else scoring.own_rows(first, rows)
        names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
        harness = open_harness(names, tasks_folder, rows) if names else None
        report = scoring.evaluate(finalists, found, measured, forms, kind, harness, keep, say)
    if as_json:
        print_json(json.loads(report.model_dump_json()))
        return
    console = console_on()
    console.print(evaluation_table(report))
    if keep is not None and keep.is_file():
        console.print(f"saved in {keep}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: orchestrator chat runs/demo --compare-base")
def chat(
    sweep_or_adapter: SweepOrAdapter,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Ask this question. Repeatable; each is a conversation of its own. Default: interactive.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .txt or .jsonl file of questions; needs --answers.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New JSONL file for the answers to --prompts.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt, for adapters trained on messages.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", min=0, max=1, help="Sample from the most likely tokens with this total probability."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Sample from this many of the most likely tokens.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Seed of the sampling, for repeatable answers.")
    ] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Show the base model's answers too.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum number of tokens in an answer.")
    ] = 256,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Chat with the best adapter.

    Interactive questions form one conversation: /clear restarts it, /exit ends it, /help lists all commands.
    """
    from orchestrator.deploy.chat import Conversation, open_chat, open_prompt_form, sampling_of
    from orchestrator.deploy.find import find_adapter
    from orchestrator.deploy.prompts import new_file, read_prompts, write_answers
    from orchestrator.training.attempt.log_file import output_to

    sampling = sampling_of(temperature, top_p, top_k, seed)
    if (prompts is None) != (answers is None) or (prompts and prompt):
        raise RequestError("--prompts FILE and --answers FILE must be used together, and without --prompt")
    adapter = find_adapter(sweep_or_adapter, output, trust)
    with output_to(Path(os.devnull)):  # drop what libraries print while they load; errors are still raised
        form = open_prompt_form(adapter, system)
    if prompts is not None and answers is not None:
        questions = read_prompts(prompts, form)
        batch_size = adapter.config.training.eval_batch_size if adapter.config else 8
        with new_file(answers) as file:
            with output_to(Path(os.devnull)):
                session = open_chat(adapter, form)
            for done in write_answers(session, questions, file, max_new_tokens, batch_size, sampling, compare_base):
                print(f"{done} of {len(questions)} answered", flush=True)
        return
    with output_to(Path(os.devnull)):
        from transformers.utils.logging import set_verbosity_error

        session = open_chat(adapter, form)
        set_verbosity_error()  # warnings of a first answer would be printed in the middle of it
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


@app.command(epilog="Example: orchestrator export runs/demo --to merged --format merged")
def export(
    sweep_or_adapter: SweepOrAdapter,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create; must not exist.")],
    format: Annotated[
        Literal["adapter", "merged", "gguf", "ray-serve"],
        typer.Option(
            metavar="FORMAT",
            help="adapter: PEFT folder; merged: one model; gguf: merged, as a llama.cpp file; "
            "ray-serve: merged, with a Ray Serve LLM config.",
        ),
    ] = "adapter",
    dtype: Annotated[
        Literal["bf16", "fp16"] | None,
        typer.Option(metavar="bf16|fp16", help=f"Type of merged weights. Default: {_DEFAULT_DTYPE}."),
    ] = None,
    onto: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Weights to merge into: dequantized, those used in training (default), or original.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows for the comparison (file, folder or glob). Default: held-out rows."),
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Export the best adapter, and compare the export with it.

    For the comparison, the export is loaded again.
    """
    from orchestrator.deploy.export.export import export as export_bundle
    from orchestrator.deploy.find import find_adapter

    adapter = find_adapter(sweep_or_adapter, output, trust)
    with _progress() as say:
        done = export_bundle(adapter, to, format, dtype, onto, data, say)
    if as_json:
        print_json(done.as_dict())
    else:
        print(f"exported to {to}: {len(done.files)} files, {done.num_bytes:,} bytes")


@app.command(epilog="Example: orchestrator verify adapter")
def verify(
    bundle: Bundle,
    as_json: Json = False,
    output: Where = "runs",
) -> None:
    """Check all files of an adapter or an export against its manifest."""
    from orchestrator.adapters.bundle import verify as verify_bundle
    from orchestrator.deploy.find import find_bundle

    folder = find_bundle(bundle, output)
    manifest = verify_bundle(folder)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    facts = manifest.facts
    of_trial = f" of trial {facts.trial_id}, step {facts.step}" if facts.trial_id else ""
    print(f"{folder}: complete: {len(manifest.files) + 1} files, {facts.format}{of_trial}, base {facts.base['model']}")


@app.command(epilog="Example: orchestrator push adapter --repo me/my-adapter --private --dry-run")
def push(
    bundle: Bundle,
    repo: Annotated[
        str, typer.Option(metavar="REPO", help="Model repo: owner/name, or a name under the token's own account.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repo as private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be uploaded, without using the network.")
    ] = False,
    output: Where = "runs",
) -> None:
    """Upload an adapter or an export to the Hugging Face Hub.

    The upload is one commit. It needs HF_TOKEN or `hf auth login`.
    """
    from orchestrator.deploy.export.push import push as push_bundle
    from orchestrator.deploy.find import find_bundle

    push_bundle(find_bundle(bundle, output), repo, private, dry_run, say=lambda line: print(line, flush=True))


@app.command(epilog="Example: orchestrator serve runs/demo --top 3 --port 8000")
def serve(
    sweep_or_adapter: SweepOrAdapter,
    engine: Annotated[
        Literal["auto", "vllm", "transformers"],
        typer.Option(
            metavar="ENGINE",
            help="auto, vllm or transformers. auto: vLLM if it is installed and supports the adapter, "
            "else transformers.",
        ),
    ] = "auto",
    top: Annotated[int, typer.Option(metavar="K", min=1, help="Serve the best K adapters of a sweep together.")] = 1,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; any address except the loopback needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            envvar="ORCHESTRATOR_TOKEN",
            show_envvar=True,
            help="Bearer token that requests must send; preferably set by the variable.",
        ),
    ] = None,
    trust: Trust = False,
    output: Where = "runs",
) -> None:
    """Serve adapters over an OpenAI-compatible HTTP API until Ctrl-C."""
    from orchestrator.deploy.serving.serve import plan_service, run_service
    from orchestrator.training.attempt.log_file import output_to

    service = plan_service(sweep_or_adapter, output, top, engine, host, port, token, trust)
    run_service(service, lambda text: print(text, flush=True), output_to(Path(os.devnull)))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that prints progress to stderr, so that stdout holds only the answer. Drop libraries' output."""
    from orchestrator.training.attempt.log_file import output_to

    with os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1) as own, output_to(Path(os.devnull)):
        yield lambda line: print(line, file=own)


def _questions() -> Iterator[str]:
    """Yield lines from standard input, with a prompt if it is a terminal."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/help":
            print("/clear restarts the conversation; /exit or /quit or Ctrl-D ends it; anything else is a question")
        elif line:
            yield line
