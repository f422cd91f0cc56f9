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

STATE = "state"
"""Column of the trial's state."""
PROGRESS = {"progress/step": "step", "progress/tokens": "tokens"}
"""Tag -> name of the columns that say how far a trial is."""

_LOGARITHMIC = "Searched on a logarithmic scale; choose Logarithmic under Scale in the views."

_SHOWN_ANYWAY = ("lora.rank", "training.learning_rate")
"""Columns of a sweep that searches no field."""


def experiment(spec: SweepSpec) -> Experiment:
    """Return the table's columns: state, all searched and tied fields, metrics of the best evaluation, progress.

    The protocol has no scale for a field, so the description of a logarithmic one says it. Every trial of a sweep
    writes the same columns, because TensorBoard uses the first description that it finds.
    """
    names = dict.fromkeys(
        [spec.search.metric, "eval/loss", "eval/token_accuracy", *(f"eval/{name}" for name in spec.evaluation.names)]
    )
    return Experiment(
        hparam_infos=[
            HParamInfo(name=STATE, type=DATA_TYPE_STRING),
            *(_field_info(spec, name, kind) for name, kind in _columns(spec).items()),
        ],
        metric_infos=[
            *(MetricInfo(name=MetricName(tag=best_tag(name))) for name in names),
            *(MetricInfo(name=MetricName(tag=tag), display_name=name) for tag, name in PROGRESS.items()),
        ],
    )


def session_start(spec: SweepSpec, config: TrialConfig, state: str) -> SessionStartInfo:
    """Return a trial's row. A field that the trial does not have, or None in a column of numbers, is an empty cell."""
    start = SessionStartInfo()
    start.hparams[STATE].string_value = state
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


def _field_info(spec: SweepSpec, name: str, kind: int) -> HParamInfo:
    """Describe a column: the ends of a range, and whether it is logarithmic."""
    info, axis = HParamInfo(name=name, type=kind), spec.search.space.get(name)
    if axis is not None and not axis.is_discrete:
        low, high = axis.probes()
        info.domain_interval.min_value, info.domain_interval.max_value = low, high
        info.description = _LOGARITHMIC if "log" in axis.kind else ""
    return info


def _kind(values: list[Any]) -> int:
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, bool) for value in given):
        return int(DATA_TYPE_BOOL)
    if given and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        return int(DATA_TYPE_FLOAT64)
    return int(DATA_TYPE_STRING)
