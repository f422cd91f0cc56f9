"""Finalists scored in the forms that ship, against the one that was trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

from orchestrator.adapters.bundle import read_scores
from orchestrator.adapters.generate import answer, matches
from orchestrator.base import device_name, load_tokenizer
from orchestrator.data import Prompt, load, prepare
from orchestrator.data.encode import encode
from orchestrator.data.render import render
from orchestrator.data.row import Row
from orchestrator.data.sources import read_rows
from orchestrator.data.stop_tokens import StopFinder
from orchestrator.data.turns import in_two_columns
from orchestrator.deploy.adapter_ref import AdapterRef, find_adapter, find_sweep, is_adapter
from orchestrator.deploy.export.merge import DTYPES, default_dtype
from orchestrator.deploy.scoring.forms import Form, OpenForm, forms_of, open_form, require_form
from orchestrator.deploy.scoring.harness import Harness
from orchestrator.deploy.scoring.metrics import GENERATED, Metric, answer_metrics, perplexity, require_packages
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.errors import DataError, RequestError
from orchestrator.record import RowScores, SweepPaths
from orchestrator.record.files import write_atomic
from orchestrator.record.models import Record
from orchestrator.spec.sections import DataSection, EvaluationSection, Source, TrainingSection, file_kind

TOLERANCE = 5e-4
"""Most that the loss of the form `adapter` may differ from the recorded one without a word."""

_FAULTS_SHOWN = 20

_T = TypeVar("_T", bound=str)


class Evaluation(Record):
    """One adapter in one form."""

    name: str
    """Trial id, or the adapter folder's name."""
    form: Form
    dtype: str
    """Of matrix products, and of the weights that are not quantised."""
    values: dict[str, float]
    """loss, token_accuracy, cost (loss minus that of the form `adapter`), and the metrics that were asked for."""
    scores: RowScores


class EvaluationReport(Record):
    """All that was evaluated at one time, on the same rows."""

    created: str
    """UTC, ISO 8601."""
    rows: str
    """Where they come from."""
    num_rows: int
    num_prompts: int
    """Those that were answered."""
    device: str
    """Name of the GPU, or cpu."""
    evaluations: list[Evaluation] = []
    warnings: list[str] = []


@dataclass(frozen=True)
class ScoredRows:
    """What forms are scored on."""

    tokens: Sequence[Mapping[str, list[int]]]
    """Each with `input_ids` and `labels`, both (tokens,)."""
    prompts: list[Prompt]
    source: str
    are_own: bool
    """Whether they are those that the adapter was evaluated on while it trained."""


def pick(given: str, known: Sequence[_T], option: str) -> list[_T]:
    """Names from a list with commas.

    Raises:
        RequestError: one is not known; the message lists those that are.
    """
    by_name: dict[str, _T] = {name: name for name in known}
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in by_name]:
        raise RequestError(f"{option} {unknown[0]!r}: is not one of {', '.join(known)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def find_finalists(sweep_or_adapter: str, output: str, top: int, trust_remote_code: bool = False) -> list[AdapterRef]:
    """An adapter folder, or the best finished trials of a sweep and the one it recommends.

    Raises:
        RecordError: neither is there, or an adapter is not whole.
    """
    if is_adapter(sweep_or_adapter):
        return [find_adapter(sweep_or_adapter, output, trust_remote_code)]
    sweep = find_sweep(sweep_or_adapter, output)
    chosen = AdapterRef.of_best(sweep.best())
    leaders = [AdapterRef.of_trial(sweep.record, trial) for trial in sweep.top(top)]
    return leaders if chosen in leaders else [*leaders, chosen]


def evaluate(
    subjects: Sequence[AdapterRef],
    rows: ScoredRows,
    metrics: Sequence[Metric],
    forms: Sequence[Form] | None = None,
    dtype: str | None = None,
    harness: Harness | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> EvaluationReport:
    """Score adapters form by form. The form `adapter` is always measured: it is what the others are held against.

    Args:
        subjects: adapters that read these rows as they are.
        rows: from `own_rows` or `rows_of_file`.
        metrics: beside the loss.
        forms: default all that the base has.
        dtype: of the 16-bit forms, by torch's name; default that of `default_dtype`.
        harness: tasks to run as well.
        keep: where the report is written after each form.
        say: hears of progress, and of each warning.

    Raises:
        RequestError: a form or a metric cannot be had.
    """
    require_packages(metrics)
    is_generating = bool(set(metrics) & set(GENERATED))
    if is_generating and not rows.prompts:
        raise RequestError(f"metrics {', '.join(metrics)}: these rows have no prompt to answer (data.format text)")
    plan = [(subject, form) for subject in subjects for form in _asked(subject, forms)]
    for subject, form in plan:
        require_form(subject.base, form)
    report = EvaluationReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rows=rows.source,
        num_rows=len(rows.tokens),
        num_prompts=len(rows.prompts) if is_generating else 0,
        device=device_name(),
    )
    trained: RowScores
    for number, (subject, form) in enumerate(plan, start=1):
        say(f"{number} of {len(plan)}: {subject.name} as {form}")
        with open_form(subject, form, dtype or DTYPES[default_dtype(subject.base)]) as opened:
            scores, values = _measure(opened, subject, rows, metrics, harness)
        if form == "adapter":  # each subject's first
            trained = scores
            for warning in _against_record(subject, rows, scores):
                report.warnings.append(warning)
                say(f"warning: {warning}")
        values["cost"] = scores.loss - trained.loss
        report.evaluations.append(
            Evaluation(name=subject.name, form=form, dtype=opened.dtype, values=values, scores=scores)
        )
        if keep is not None:
            try:
                write_atomic(keep, report.model_dump_json(indent=2) + "\n")
            except OSError as error:  # what was measured is not lost for that
                report.warnings.append(f"{keep}: cannot be written: {error}")
                say(f"warning: {report.warnings[-1]}")
    return report


def new_report(sweep: SweepPaths) -> Path:
    """Where a report is kept: a name by this moment, which no other evaluation has, on whatever machine it runs."""
    # Not taken by an empty file: until something is measured, nothing is written.
    return sweep.evaluations / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{token_hex(4)}.json"


def own_rows(subject: AdapterRef, limit: int | None = None) -> ScoredRows:
    """The held-out rows that an adapter was evaluated on while it trained, and the prompts that it answered.

    Args:
        subject: the adapter; outside its sweep, its rows are prepared again.
        limit: take only the first rows and prompts.

    Raises:
        RequestError: it does not say which they are, or they cannot be had.
    """
    remedy = "--data FILE gives rows to evaluate on, in the columns of the training file."
    if subject.config is None:
        raise RequestError(f"{subject.adapter}: does not say what it was trained on (no trial.json)", remedy)
    if subject.sweep is not None and subject.sweep.data.is_dir():
        prepared, source = load(subject.sweep.data), f"held-out rows of {subject.sweep.name}"
    else:
        try:
            prepared, source = prepare(subject.config.data, subject.config.base), "held-out rows, prepared again"
        except DataError as error:
            raise RequestError(
                f"{subject.adapter}: its held-out rows cannot be had again: {error.message}", remedy
            ) from error
    num_rows = min(limit or len(prepared.held_out), len(prepared.held_out))
    prompts = prepared.prompts[: limit or subject.config.evaluation.rows]
    return ScoredRows(prepared.held_out.select(range(num_rows)), prompts, source, are_own=True)


def rows_of_file(subject: AdapterRef, file: Path, limit: int | None = None) -> ScoredRows:
    """Rows of a file, written as those that the adapter was trained on.

    Args:
        subject: the adapter; for one that does not say how its rows were written, the columns tell the format.
        file: of any kind that rows may be in, a folder or glob of them, or a saved data set (its split train), in the
            columns of the training file.
        limit: take only the first rows.

    Raises:
        DataError: the file cannot be read, or rows are bad; the message names file and line of each.
    """
    is_csv = file_kind(file) in (".csv", ".tsv")
    delimiter = subject.config.data.delimiter if subject.config and is_csv else None  # that of the training file
    found = read_rows(Source(source=str(file.resolve()), max_rows=limit, delimiter=delimiter))
    section = subject.config.data if subject.config else _section(found[0], file)
    tokenizer = load_tokenizer(subject.base, section.chat_template)
    finder = StopFinder(tokenizer)
    tokens: list[Mapping[str, list[int]]] = []
    prompts: list[Prompt] = []
    faults: dict[str, None] = {}  # one that is not the row's own, such as no chat template, comes once
    for row in found:
        try:
            example = render(row, section, tokenizer)
        except DataError as error:
            faults[error.message] = None
            continue
        encoded = encode(example, tokenizer, section)
        if section.truncate == "error" and len(encoded.ids) > section.max_length:
            faults[f"{row.where}: has {len(encoded.ids)} tokens, over data.max_length={section.max_length}"] = None
            continue
        short = encoded.cut(section.max_length, section.truncate)
        if short is None:
            faults[f"{row.where}: has no token of a completion within data.max_length={section.max_length}"] = None
            continue
        tokens.append({"input_ids": short.ids, "labels": short.labels})
        prompts.append(Prompt(encoded.prompt_after_cut(short), finder.without_stop(example.answer)))
    if faults:
        shown = list(faults)[:_FAULTS_SHOWN]
        more = [f"and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        raise DataError("\n".join([*shown, *more]), "The file needs the columns that the adapter was trained on.")
    return ScoredRows(tokens, [] if section.format == "text" else prompts, str(file), are_own=False)


def _asked(subject: AdapterRef, forms: Sequence[Form] | None) -> list[Form]:
    """The trained form first."""
    return ["adapter", *(form for form in (forms or forms_of(subject.base)) if form != "adapter")]


def _measure(
    opened: OpenForm, subject: AdapterRef, rows: ScoredRows, metrics: Sequence[Metric], harness: Harness | None
) -> tuple[RowScores, dict[str, float]]:
    config = subject.config
    batch_size = (config.training if config else TrainingSection()).eval_batch_size
    scores = score_rows(opened.model, rows.tokens, batch_size)
    values = {"loss": scores.loss, "token_accuracy": scores.token_accuracy}
    if "perplexity" in metrics:
        values["perplexity"] = perplexity(scores.loss)
    if set(metrics) & set(GENERATED):
        most = (config.evaluation if config else EvaluationSection()).max_new_tokens
        ids, wanted = [prompt.ids for prompt in rows.prompts], [prompt.answer for prompt in rows.prompts]
        said = answer(opened.model, opened.tokenizer, ids, most, batch_size)
        values |= answer_metrics(said, wanted, metrics)
        scores = scores.model_copy(update={"answers": matches(said, wanted)})
    if harness is not None:
        values |= harness.measure(opened, batch_size)
    return scores, values


def _against_record(subject: AdapterRef, rows: ScoredRows, scores: RowScores) -> list[str]:
    """What speaks against it that the adapter, measured here, is the one that was evaluated while it trained."""
    if not rows.are_own:
        return []
    recorded, number = read_scores(subject.adapter), len(scores.losses)
    if recorded is None:
        return [f"{subject.name}: its folder holds no scores of its rows, so that its loss is held against nothing"]
    if recorded.tokens[:number] != scores.tokens:
        return [f"{subject.name}: these rows are not those that it was evaluated on while it trained"]
    loss = sum(recorded.losses[:number]) / sum(recorded.tokens[:number])
    if abs(scores.loss - loss) <= TOLERANCE:
        return []
    return [
        f"{subject.name}: its loss as it was trained is {scores.loss:.6g} here, {scores.loss - loss:+.2g} from the "
        f"{loss:.6g} that was recorded while it trained"
    ]


def _section(row: Row, file: Path) -> DataSection:
    """The format that a row's columns tell."""
    columns = set(row.values)
    if "messages" in columns or in_two_columns(row.values):
        return DataSection(source=str(file.resolve()), format="messages", loss_on="completion")
    if {"prompt", "completion"} <= columns:
        return DataSection(source=str(file.resolve()), format="prompt", loss_on="completion")
    if "text" in columns:
        return DataSection(source=str(file.resolve()), format="text")
    raise DataError(
        f"{row.where}: the adapter does not say how its rows were written, and these columns do not tell: "
        f"{', '.join(row.values)}",
        "Give a file with the columns messages, prompt and completion, or text.",
    )
