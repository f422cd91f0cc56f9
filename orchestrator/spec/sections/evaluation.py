"""The evaluation section: metrics of generated answers, among them a user's own Python function."""

import ast
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section

BUILT_IN = ("exact_match",)
"""Metrics that need no file."""

STDERR = "_stderr"
"""Ending of the name under which a metric's standard error is recorded, as in lm-evaluation-harness."""

_MEASURED = ("loss", "token_accuracy")
"""Names of metrics that every evaluation has."""

_WRITTEN = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_][A-Za-z0-9_]*)")
"""FILE.py:FUNCTION."""


class OwnMetric(Section):
    """A user's own metric as records hold it: a Python function with the text of its file, so that it goes wherever the
    trial goes. In an experiment file write FILE.py:FUNCTION."""

    sha256: str
    """Checksum of the text."""
    file: str
    """Absolute path of the file that it was read from."""
    function: str
    """Name of the function."""
    source: str
    """Text of the file."""

    @classmethod
    def read(cls, written: str, folder: Path) -> Self | None:
        """Read the file of a metric that is written as FILE.py:FUNCTION; None if `written` has another form.

        Args:
            written: the metric, as in an experiment file.
            folder: where a relative path starts.

        Raises:
            OSError, UnicodeDecodeError: the file cannot be read as text.
        """
        if (parts := _WRITTEN.fullmatch(written)) is None:
            return None
        file = (folder / Path(parts["file"]).expanduser()).resolve()
        source = file.read_text(encoding="utf-8")
        return cls(file=str(file), function=parts["function"], sha256=_sha256(source), source=source)

    @property
    def written(self) -> str:
        """The metric as a person writes it."""
        return f"{self.file}:{self.function}"

    @model_validator(mode="after")
    def _holds_the_function(self) -> Self:
        if _sha256(self.source) != self.sha256:
            raise ValueError(f"{self.file}: its recorded text does not match its sha256; start a new sweep")
        try:
            functions = _functions(self.source)
        except SyntaxError as error:
            raise ValueError(f"{self.file}: line {error.lineno}: is not Python: {error.msg}") from error
        if self.function not in functions:
            found = ", ".join(functions) or "none"
            raise ValueError(f"{self.file}: there is no function {self.function!r}; functions there: {found}")
        return self


@cache
def _functions(source: str) -> tuple[str, ...]:
    """Return the names of a text's functions. It is read once, because the record of each trial holds the text."""
    return tuple(node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class EvaluationSection(Section):
    """Metrics on the held-out rows, in addition to the loss and the token accuracy."""

    metrics: list[str | OwnMetric] = []
    """Metrics of generated answers: exact_match, or a function of your own as FILE.py:FUNCTION. They are computed with
    the best adapter of COMPLETE trials, or at every evaluation if search.metric is one of them."""
    rows: PositiveInt = 64
    """Number of held-out prompts that are answered."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens in an answer."""

    @field_validator("metrics")
    @classmethod
    def _are_metrics(cls, metrics: list[str | OwnMetric]) -> list[str | OwnMetric]:
        names = [metric_name(metric) for metric in metrics]
        for metric, name in zip(metrics, names, strict=True):
            if isinstance(metric, str) and metric not in BUILT_IN:
                raise ValueError(f"{metric!r} is unknown; write 'exact_match', or FILE.py:FUNCTION for your own metric")
            if isinstance(metric, OwnMetric) and (name in (*BUILT_IN, *_MEASURED) or name.endswith(STDERR)):
                raise ValueError(f"{name} is the name of another metric; rename the function in {metric.file}")
            if names.count(name) > 1:
                raise ValueError(f"{name} is there twice; give each metric a name of its own")
        return metrics

    @property
    def names(self) -> list[str]:
        """Names of the metrics, under which `eval/NAME` is recorded."""
        return [metric_name(metric) for metric in self.metrics]

    @property
    def own(self) -> list[OwnMetric]:
        """The metrics that are functions of the user."""
        return [metric for metric in self.metrics if isinstance(metric, OwnMetric)]

    @property
    def answer_tokens(self) -> int:
        """Maximum number of tokens that are generated after a prompt; 0 without metrics of generated answers."""
        return self.max_new_tokens if self.metrics else 0

    def is_measured_at_evaluations(self, metric: str) -> bool:
        """Return whether trials that are compared by `metric` generate answers at every evaluation."""
        return metric.removeprefix("eval/") in self.names


def metric_name(metric: str | OwnMetric) -> str:
    """Return the name of a metric of generated answers."""
    return metric if isinstance(metric, str) else metric.function
