"""Rows and columns of a sweep's HParams table in TensorBoard."""

from typing import Any

from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_BOOL,
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

from orchestrator.spec import SweepSpec, TrialConfig

_SHOWN_ANYWAY = ("lora.rank", "training.learning_rate")
"""Columns of a sweep that searches no field."""


def experiment(spec: SweepSpec) -> Experiment:
    """Return the table's columns: all searched and tied fields, and the metrics of the best evaluation.

    Every trial of a sweep writes the same columns, because TensorBoard uses the first description that it finds.
    """
    names = dict.fromkeys(
        [spec.search.metric, "eval/loss", "eval/token_accuracy", *(f"eval/{name}" for name in spec.evaluation.names)]
    )
    return Experiment(
        hparam_infos=[HParamInfo(name=name, type=kind) for name, kind in _columns(spec).items()],
        metric_infos=[MetricInfo(name=MetricName(tag=best_tag(name))) for name in names],
    )


def session_start(spec: SweepSpec, config: TrialConfig) -> SessionStartInfo:
    """Return a trial's row. A field that the trial does not have, or None in a column of numbers, is an empty cell."""
    start = SessionStartInfo()
    columns, fields = _columns(spec), config.dotted()
    # A trial without search has the experiment's own values.
    values = config.varied or {name: fields[name] for name in columns if name in fields}
    for name, kind in columns.items():
        if name not in values:
            continue
        value = values[name]
        if kind == DATA_TYPE_STRING:
            start.hparams[name].string_value = str(value)
        elif value is not None and kind == DATA_TYPE_BOOL:
            start.hparams[name].bool_value = value
        elif value is not None:
            start.hparams[name].number_value = value
    return start


def best_tag(metric: str) -> str:
    """Return the tag of a metric's scalar at the trial's best evaluation so far."""
    return f"best/{metric}"


def _columns(spec: SweepSpec) -> dict[str, int]:
    """Return field -> type of its column. A column with values of several types is text."""
    columns = {path: _kind(axis.values) for path, axis in spec.search.space.items()}
    columns |= dict.fromkeys(spec.search.tied, DATA_TYPE_FLOAT64)  # a tie is arithmetic
    return columns or dict.fromkeys(_SHOWN_ANYWAY, DATA_TYPE_FLOAT64)


def _kind(values: list[Any]) -> int:
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, bool) for value in given):
        return int(DATA_TYPE_BOOL)
    if given and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        return int(DATA_TYPE_FLOAT64)
    return int(DATA_TYPE_STRING)
