"""Evaluate the best adapters in each form they may be deployed in, and compare each form with the trained one."""

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
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.dtypes import DTYPES, default_dtype
from orchestrator.deploy.find import find_adapter, find_sweep, is_adapter
from orchestrator.deploy.scoring.forms import Form, OpenForm, forms_of, open_form, require_form
from orchestrator.deploy.scoring.harness import Harness
from orchestrator.deploy.scoring.metrics import GENERATED, Metric, answer_metrics, perplexity, require_packages
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.errors import DataError, RequestError
from orchestrator.positions import rows_per_pass
from orchestrator.record import RowScores, SweepPaths
from orchestrator.record.files import write_atomic
from orchestrator.record.models import Record
from orchestrator.spec.sections import DataSection, EvaluationSection, Source, TrainingSection, file_kind

TOLERANCE = 5e-4
"""Difference between the loss of the form `adapter` and the recorded loss, above which a warning is given."""

_NUM_FAULTS_SHOWN = 20
"""Bad rows that an error message lists."""

_T = TypeVar("_T", bound=str)


class Evaluation(Record):
    """Scores of one adapter in one form."""

    name: str
    """Trial id, or the adapter folder's name."""
    form: Form
    dtype: str
    """Type of matrix products and of the weights that are not quantized."""
    values: dict[str, float]
    """loss, token_accuracy, cost (loss minus the loss of the form `adapter`), and the requested metrics."""
    scores: RowScores


class EvaluationReport(Record):
    """All evaluations of one call, on the same rows."""

    created: str
    """Time in UTC, ISO 8601."""
    rows: str
    """Description of where the rows come from."""
    num_rows: int
    num_prompts: int
    """Number of prompts that were answered."""
    device: str
    """Name of the GPU, or cpu."""
    evaluations: list[Evaluation] = []
    warnings: list[str] = []


@dataclass(frozen=True)
class ScoredRows:
    """Rows and prompts that forms are scored on."""

    tokens: Sequence[Mapping[str, list[int]]]
    """Tokenized rows, each with `input_ids` and `labels`, both (tokens,)."""
    prompts: list[Prompt]
    source: str
    are_own: bool
    """Whether the adapter was evaluated on these rows during training."""


def pick(given: str, known: Sequence[_T], option: str) -> list[_T]:
    """Parse a comma-separated list of names.

    Raises:
        RequestError: a name is unknown; the message lists the known ones.
    """
    by_name: dict[str, _T] = {name: name for name in known}
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in by_name]:
        raise RequestError(f"{option} {unknown[0]!r}: is unknown; choose from {', '.join(known)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def find_finalists(sweep_or_adapter: str, output: str, top: int, trust_remote_code: bool = False) -> list[AdapterRef]:
    """Find the adapters to evaluate: an adapter folder, or the best trials of a sweep and the recommended one.

    Raises:
        RecordError: there is no such sweep or adapter, or an adapter is incomplete or changed.
        RequestError: a base brings code, and code is not trusted.
    """
    if is_adapter(sweep_or_adapter):
        return [find_adapter(sweep_or_adapter, output, trust_remote_code)]
    sweep = find_sweep(sweep_or_adapter, output)
    chosen = sweep.best().adapter_ref()
    leaders = [AdapterRef.of_trial(sweep.record, trial) for trial in sweep.top(top)]
    finalists = leaders if chosen in leaders else [*leaders, chosen]
    return [adapter.trusted(trust_remote_code) for adapter in finalists]


def evaluate(
    adapters: Sequence[AdapterRef],
    rows: ScoredRows,
    metrics: Sequence[Metric],
    forms: Sequence[Form] | None = None,
    dtype: str | None = None,
    harness: Harness | None = None,
    report_file: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> EvaluationReport:
    """Score adapters form by form. The form `adapter` is always included, as the reference for the others.

    Args:
        adapters: adapters with the tokenizer and row format of `rows`.
        rows: from `own_rows` or `rows_of_file`.
        metrics: metrics in addition to the loss.
        forms: forms to score; default all forms of the base.
        dtype: torch's name of the type of the 16-bit forms; default `default_dtype`.
        harness: tasks to run as well.
        report_file: file that the report is written to after each form.
        say: reports progress and warnings.

    Raises:
        RequestError: a form or a metric is not available.
    """
    require_packages(metrics)
    is_generating = bool(set(metrics) & set(GENERATED))
    if is_generating and not rows.prompts:
        raise RequestError(
            f"metrics {', '.join(metrics)}: rows of data.format text have no prompt to answer",
            "Leave out exact_match, rouge and bleu.",
        )
    plan = [(adapter, form) for adapter in adapters for form in _forms_to_score(adapter, forms)]
    for adapter, form in plan:
        require_form(adapter.base, form)
    report = EvaluationReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rows=rows.source,
        num_rows=len(rows.tokens),
        num_prompts=len(rows.prompts) if is_generating else 0,
        device=device_name(),
    )
    trained: RowScores
    for number, (adapter, form) in enumerate(plan, start=1):
        say(f"{number} of {len(plan)}: {adapter.name} as {form}")
        with open_form(adapter, form, dtype or DTYPES[default_dtype(adapter.base)]) as opened:
            scores, values = _measure(opened, adapter, rows, metrics, harness)
        if form == "adapter":  # the first form of each adapter
            trained = scores
            for warning in _compare_with_record(adapter, rows, scores):
                report.warnings.append(warning)
                say(f"warning: {warning}")
        values["cost"] = scores.loss - trained.loss
        report.evaluations.append(
            Evaluation(name=adapter.name, form=form, dtype=opened.dtype, values=values, scores=scores)
        )
        if report_file is not None:
            try:
                write_atomic(report_file, report.model_dump_json(indent=2) + "\n")
            except OSError as error:  # the measurements are still returned
                report.warnings.append(f"{report_file}: cannot be written: {error}")
                say(f"warning: {report.warnings[-1]}")
    return report


def new_report(sweep: SweepPaths) -> Path:
    """Return a new file name for a report, unique even among machines that share the folder."""
    # The name is not reserved by an empty file: nothing is written until something is measured.
    return sweep.evaluations / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{token_hex(4)}.json"


def own_rows(adapter: AdapterRef, limit: int | None = None) -> ScoredRows:
    """Return the held-out rows that an adapter was evaluated on during training, and the prompts it answered.

    Args:
        adapter: the adapter; outside its sweep, its rows are prepared again.
        limit: take only the first rows and prompts.

    Raises:
        RequestError: the adapter does not record its data, or the data are not available.
    """
    remedy = "Give rows with the columns of the training file by --data FILE."
    if adapter.config is None:
        raise RequestError(f"{adapter.folder}: has no trial.json, so its training data are unknown", remedy)
    if adapter.sweep is not None and adapter.sweep.data.is_dir():
        prepared, source = load(adapter.sweep.data), f"held-out rows of {adapter.sweep.name}"
    else:
        try:
            prepared, source = prepare(adapter.config.data, adapter.config.base), "held-out rows, prepared again"
        except DataError as error:
            raise RequestError(
                f"{adapter.folder}: its held-out rows cannot be prepared again: {error.message}", remedy
            ) from error
    num_rows = min(limit or len(prepared.held_out), len(prepared.held_out))
    prompts = prepared.prompts[: limit or adapter.config.evaluation.rows]
    return ScoredRows(prepared.held_out.select(range(num_rows)), prompts, source, are_own=True)


def rows_of_file(adapter: AdapterRef, file: Path, limit: int | None = None) -> ScoredRows:
    """Read rows of a file, rendered in the format that the adapter was trained on.

    Args:
        adapter: the adapter; if it does not record its format, the format is inferred from the columns.
        file: a data file, a folder or glob of data files, or a saved dataset (its split train), with the columns of
            the training file.
        limit: take only the first rows.

    Raises:
        DataError: the file cannot be read, or rows are invalid; the message names file and line of each.
    """
    is_csv = file_kind(file) in (".csv", ".tsv")
    delimiter = adapter.config.data.delimiter if adapter.config and is_csv else None  # as in the training file
    found = read_rows(Source(source=str(file.resolve()), max_rows=limit, delimiter=delimiter))
    section = adapter.config.data if adapter.config else _section(found[0], file)
    tokenizer = load_tokenizer(adapter.base, section.chat_template)
    finder = StopFinder(tokenizer)
    tokens: list[Mapping[str, list[int]]] = []
    prompts: list[Prompt] = []
    faults: dict[str, None] = {}  # a dict: a fault shared by all rows, such as a missing chat template, is listed once
    for row in found:
        try:
            example = render(row, section, tokenizer)
        except DataError as error:
            faults[error.message] = None
            continue
        encoded = encode(example, tokenizer, section)
        if section.truncate == "error" and len(encoded.ids) > section.max_length:
            faults[f"{row.where}: has {len(encoded.ids)} tokens, more than data.max_length={section.max_length}"] = None
            continue
        truncated = encoded.cut(section.max_length, section.truncate)
        if truncated is None:
            faults[f"{row.where}: has no token of its completion within data.max_length={section.max_length}"] = None
            continue
        tokens.append({"input_ids": truncated.ids, "labels": truncated.labels})
        prompts.append(Prompt(encoded.prompt_after_cut(truncated), finder.without_stop(example.answer)))
    if faults:
        shown = list(faults)[:_NUM_FAULTS_SHOWN]
        more = [f"and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        raise DataError("\n".join([*shown, *more]), "The file needs the columns of the training file.")
    return ScoredRows(tokens, [] if section.format == "text" else prompts, str(file), are_own=False)


def _forms_to_score(adapter: AdapterRef, forms: Sequence[Form] | None) -> list[Form]:
    """Put the trained form first."""
    return ["adapter", *(form for form in (forms or forms_of(adapter.base)) if form != "adapter")]


def _measure(
    opened: OpenForm, adapter: AdapterRef, rows: ScoredRows, metrics: Sequence[Metric], harness: Harness | None
) -> tuple[RowScores, dict[str, float]]:
    config = adapter.config
    batch_size = (config.training if config else TrainingSection()).eval_batch_size
    scores = score_rows(opened.model, rows.tokens, batch_size)
    values = {"loss": scores.loss, "token_accuracy": scores.token_accuracy}
    if "perplexity" in metrics:
        values["perplexity"] = perplexity(scores.loss)
    if set(metrics) & set(GENERATED):
        max_new_tokens = (config.evaluation if config else EvaluationSection()).max_new_tokens
        ids, expected = [prompt.ids for prompt in rows.prompts], [prompt.answer for prompt in rows.prompts]
        answers = answer(opened.model, opened.tokenizer, ids, max_new_tokens, batch_size)
        values |= answer_metrics(answers, expected, metrics)
        scores = scores.model_copy(update={"metrics": {"exact_match": [*map(float, matches(answers, expected))]}})
    if harness is not None:
        values |= harness.measure(opened, rows_per_pass(opened.model.config, batch_size, None))
    return scores, values


def _compare_with_record(adapter: AdapterRef, rows: ScoredRows, scores: RowScores) -> list[str]:
    """Compare the scores of the trained form with those recorded during training. Returns warnings."""
    if not rows.are_own:
        return []
    recorded, number = read_scores(adapter.folder), len(scores.losses)
    if recorded is None:
        return [
            f"{adapter.name}: its folder has no row scores, so its loss cannot be compared with the one in training"
        ]
    if recorded.tokens[:number] != scores.tokens:
        return [f"{adapter.name}: these rows differ from those that it was evaluated on during training"]
    loss = sum(recorded.losses[:number]) / sum(recorded.tokens[:number])
    if abs(scores.loss - loss) <= TOLERANCE:
        return []
    return [
        f"{adapter.name}: the loss of form adapter is {scores.loss:.6g} here, {scores.loss - loss:+.2g} from the "
        f"{loss:.6g} recorded during training"
    ]


def _section(row: Row, file: Path) -> DataSection:
    """Infer the format from the columns of a row."""
    columns = set(row.values)
    if "messages" in columns or in_two_columns(row.values):
        return DataSection(source=str(file.resolve()), format="messages", loss_on="completion")
    if {"prompt", "completion"} <= columns:
        return DataSection(source=str(file.resolve()), format="prompt", loss_on="completion")
    if "text" in columns:
        return DataSection(source=str(file.resolve()), format="text")
    raise DataError(
        f"{row.where}: the adapter does not record its data format, and it cannot be inferred from the columns "
        f"{', '.join(row.values)}",
        "Give a file with the column messages, the columns prompt and completion, or the column text.",
    )
