"""Metrics of generated answers: one number for each row, by exact match or by a user's own function.

The contract of a metric is `function(prompts, answers, references) -> list of floats`, one for each row; all three
arguments are lists of text, in the order of the rows. Its value is the mean over the rows. The numbers of the rows are
kept, so that the standard error is known and trials can be compared row by row.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from orchestrator.adapters.generate import matches
from orchestrator.errors import MetricError, RequestError
from orchestrator.spec.sections import OwnMetric
from orchestrator.spec.sections.evaluation import metric_name

RowMetric = Callable[[list[str], list[str], list[str]], list[float]]
"""(prompts, answers, references) -> the metric of each row."""

_FAULTS = (Exception, SystemExit)
"""What a user's own code may raise. SystemExit would end the worker's thread, and with it the trials of others."""

_MAX_SHOWN = 60
"""Characters of a text that a message shows."""


@dataclass(frozen=True)
class AnsweredRows:
    """Prompts, their generated answers, and the expected ones, each a list of text in the order of the rows."""

    prompts: list[str]
    answers: list[str]
    references: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> "AnsweredRows":
        """Return one row alone."""
        part = slice(index, index + 1)
        return AnsweredRows(self.prompts[part], self.answers[part], self.references[part])


def score_rows_by(metrics: Sequence[str | OwnMetric], rows: AnsweredRows) -> dict[str, list[float]]:
    """Compute metrics row by row: name of the metric -> a number for each row.

    Raises:
        MetricError: a user's own function cannot be loaded, fails, or returns something else than a finite number for
            each row. The message names the row.
    """
    return {
        metric_name(metric): (
            exact_match(rows.prompts, rows.answers, rows.references)
            if isinstance(metric, str)
            else _score_by_own(metric, rows)
        )
        for metric in metrics
    }


def exact_match(_: list[str], answers: list[str], references: list[str]) -> list[float]:
    """Return 1 for each answer that equals its reference, else 0. Space around both is ignored."""
    return [float(is_equal) for is_equal in matches(answers, references)]


def try_own_metrics(metrics: Sequence[OwnMetric], prompt: str, reference: str) -> None:
    """Call each function on one row, whose answer is the expected one, before anything is trained.

    Raises:
        RequestError: a function cannot be loaded, fails, or does not return what it should.
    """
    rows = AnsweredRows([prompt], [reference], [reference])
    for metric in metrics:
        try:
            _score_by_own(metric, rows)
        except MetricError as error:
            raise RequestError(
                f"{error.message} (tried with its reference as the answer)", "Correct the function."
            ) from error


def _score_by_own(metric: OwnMetric, rows: AnsweredRows) -> list[float]:
    function = _load(metric)
    try:
        returned = _call(function, rows)
    except _FAULTS as error:
        index = _failing_row(function, rows)
        if index is None:
            raise _fault(metric, f"failed on all rows together: {_describe(error)}") from error
        raise _fault(metric, f"failed on {_place(rows, index)}: {_describe(error)}") from error
    if not isinstance(returned, list | tuple) and not hasattr(returned, "tolist"):
        raise _fault(metric, f"returned {type(returned).__name__}, not a list of numbers, one for each row")
    values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
    if not isinstance(values, list) or len(values) != len(rows):
        count = len(values) if isinstance(values, list) else "one"
        raise _fault(metric, f"returned {count} numbers for {len(rows)} rows")
    for index, value in enumerate(values):
        if not _is_number(value):
            raise _fault(metric, f"returned {value!r:.{_MAX_SHOWN}} for {_place(rows, index)}, not a finite number")
    return [float(value) for value in values]


def _call(function: RowMetric, rows: AnsweredRows) -> Any:
    """Call a function with lists of its own, which it may change. What it prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        return function([*rows.prompts], [*rows.answers], [*rows.references])


def _failing_row(function: RowMetric, rows: AnsweredRows) -> int | None:
    """Return the first row on which a function fails by itself; None if it fails on no row alone."""
    for index in range(len(rows)):
        try:
            _call(function, rows.row(index))
        except _FAULTS:  # what the user must see is the row
            return index
    return None


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _place(rows: AnsweredRows, index: int) -> str:
    answer, reference = (f"{texts[index]!r:.{_MAX_SHOWN}}" for texts in (rows.answers, rows.references))
    return f"row {index} (answer {answer}, reference {reference})"


def _describe(error: BaseException) -> str:
    """Return an exception with the line of the user's file in which it was raised last."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__own_metric__"):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def _fault(metric: OwnMetric, what: str) -> MetricError:
    return MetricError(
        f"evaluation.metrics: {metric.function} of {metric.file} {what}",
        "Correct the function, and start a new sweep: each sweep keeps the text of the file as it was at its start.",
    )


def _load(metric: OwnMetric) -> RowMetric:
    try:
        function: RowMetric = getattr(_module(metric.file, metric.source), metric.function)
    except _FAULTS as error:
        raise _fault(metric, f"cannot be loaded: {_describe(error)}") from error
    return function


@cache
def _module(file: str, source: str) -> ModuleType:
    """Run the text of a file as a module of its own, once per process, however many metrics it has."""
    module = ModuleType(f"own_metric_{abs(hash((file, source)))}")
    module.__dict__.update(__file__=file, __own_metric__=True)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    with redirect_stdout(sys.stderr):  # a program may read the output of this command
        exec(compile(source, file, "exec"), module.__dict__)  # the user's own code, as an import would run it
    return module
