"""The records of a sweep as pandas frames, and as files of tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas

from orchestrator.analysis.importance import Importances
from orchestrator.analysis.outcomes import find_outcomes
from orchestrator.analysis.sweep_data import SweepData, value_of

TableFormat = Literal["csv", "parquet"]

DECISION_COLUMNS = ("trial", "step", "action", "why", "donor")
IMPORTANCE_COLUMNS = (
    "field", "importance", "importance_low", "importance_high", "better", "worse", "effect", "effect_low",
    "effect_high", "p_value", "matters",
)  # fmt: skip


def trials_frame(data: SweepData) -> pandas.DataFrame:
    """Return one row for each trial, best first.

    `value` is the best value of the search metric. `outcome` is the same or, for a trial that was stopped early, the
    value forecast for its end. Searched and tied fields and all metrics of the best evaluation have a column each.
    """
    outcomes = {each.trial.trial_id: each for each in find_outcomes(data).known}
    fields = list(dict.fromkeys(name for trial in data.trials for name in trial.config.varied))
    metrics = list(dict.fromkeys(name for trial in data.trials if trial.best for name in trial.best.values))
    rows = []
    for trial in data.trials:
        outcome, best = outcomes.get(trial.trial_id), trial.best
        rows.append(
            {
                "trial": trial.trial_id,
                "state": str(trial.state),
                "value": value_of(trial),
                "best_step": best.step if best else None,
                "step": trial.step,
                "total_steps": trial.total_steps,
                "outcome": outcome.value if outcome else None,
                "is_forecast": bool(outcome and outcome.is_forecast),
                "tokens": trial.tokens,
                "tokens_per_second": trial.tokens_per_second,
                "seconds": trial.seconds,
                "gpu_seconds": trial.gpu_seconds,
                "peak_memory_gib": trial.peak_memory_gib,
                "num_parameters": trial.num_parameters,
                "engine": trial.engine,
                "device": trial.device,
                "worker": trial.worker,
                "started": trial.started,
                "ended": trial.ended,
                "stopped": trial.stopped,
                "failure": trial.failure,
                "error": trial.error,
            }
            | {name: best.values.get(name) if best else None for name in metrics}
            | {name: trial.config.varied.get(name) for name in fields}
        )
    frame = _frame(rows, ("trial", "state", "value", "best_step", "step", "total_steps", "outcome", "is_forecast"))
    for name in ("started", "ended"):
        if name in frame:
            frame[name] = pandas.to_datetime(frame[name], utc=True, format="ISO8601")
    return frame


def curves_frame(data: SweepData) -> pandas.DataFrame:
    """Return one row for each metric point of each trial: step, tokens, seconds, GPU seconds and metrics.

    GPU seconds are recorded for whole trials. At a point they are the trial's, in proportion to its time.
    """
    rows = []
    for trial in data.trials:
        per_second = trial.gpu_seconds / trial.seconds if trial.seconds else 0.0
        for point in data.points[trial.trial_id]:
            times = {"seconds": point.time_s, "gpu_seconds": point.time_s * per_second}
            rows.append({"trial": trial.trial_id, "step": point.step, "tokens": point.tokens} | times | point.values)
    return _frame(rows, ("trial", "step", "tokens", "seconds", "gpu_seconds"))


def decisions_frame(data: SweepData) -> pandas.DataFrame:
    """Return one row for each decision of search and scheduler, in order."""
    rows = [
        {"trial": each.trial_id, "step": each.step, "action": each.action, "why": each.why, "donor": each.donor}
        for each in data.decisions
    ]
    return _frame(rows, DECISION_COLUMNS)


def importances_frame(found: Importances) -> pandas.DataFrame:
    """Return one row for each searched field, the most important first.

    `effect` is the change from the worst value tried to that of the leader: of the logarithm of the loss, or of another
    metric itself. `attrs["why_none"]` says why there is no row.
    """
    rows = [
        dict(
            zip(
                IMPORTANCE_COLUMNS,
                (
                    each.field, each.share, each.share_low, each.share_high, each.effect.better, each.effect.worse,
                    each.effect.change, each.effect.low, each.effect.high, each.effect.p_value, each.matters,
                ),
                strict=True,
            )
        )
        for each in found.fields
    ]  # fmt: skip
    frame = _frame(rows, IMPORTANCE_COLUMNS)
    frame.attrs["why_none"] = found.why_none
    return frame


def save_tables(frames: dict[str, pandas.DataFrame], folder: Path, format: TableFormat) -> list[Path]:
    """Write each frame as `NAME.csv` or `NAME.parquet`, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, frame in frames.items():
        file = folder / f"{name}.{format}"
        if format == "csv":
            frame.to_csv(file, index=False)
        else:
            frame.to_parquet(file, index=False)
        files.append(file)
    return files


def _frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """Return a frame whose columns each have one type: values of several types become text."""
    frame = pandas.DataFrame(rows, columns=None if rows else list(columns))
    for name in frame.columns:
        kinds = {type(value) for value in frame[name] if value is not None}
        is_number = kinds <= {int, float}
        if (frame[name].dtype == object and len(kinds) > 1 and not is_number) or kinds & {list, dict, tuple}:
            frame[name] = [None if value is None else str(value) for value in frame[name]]
    return frame
