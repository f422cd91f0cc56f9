"""List the sweeps in a folder."""

from pathlib import Path
from typing import Any

from rich.cells import cell_len

from orchestrator.errors import RecordError
from orchestrator.record import OPEN, SweepRecord, TrialState, find_damage, is_finished, read_sweep
from orchestrator.record.lock import driver_state
from orchestrator.report.tables import number

_HEADS = ("sweep", "state", "ended", "failed", "best", "created")


def sweep_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a document for each sweep in a folder, the newest first. A damaged one has only a name and the fault."""
    rows = []
    for path in folder.glob("*/sweep.json"):
        try:
            rows.append(_row(read_sweep(path.parent)))
        except RecordError as error:
            rows.append({"sweep": path.parent.name, "state": "damaged", "fault": error.message, "created": ""})
    return sorted(rows, key=lambda row: str(row["created"]), reverse=True)


def sweeps_lines(rows: list[dict[str, Any]], folder: str, width: int) -> list[str]:
    """Return the documents of `sweep_rows` as a table. Columns that do not fit are left out, the last ones first."""
    if not rows:
        return [f"there are no sweeps in {folder}"]
    cells = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(cell_len(row[column]) for row in cells) for column in range(len(_HEADS))]
    while len(widths) > 2 and sum(widths) + 2 * (len(widths) - 1) > width:
        widths.pop()
    lines = ["  ".join(f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=False)).rstrip() for row in cells]
    faults = [fault for row in rows for fault in ([row["fault"]] if "fault" in row else row["damaged"])]
    return lines + [f"damaged: {fault}" for fault in faults]


def _row(record: SweepRecord) -> dict[str, Any]:
    trials, info = record.trials(), record.info
    is_running = driver_state(record.paths).is_running
    best = next((trial for trial in trials if trial.best), None)
    return {
        "sweep": record.paths.name,
        "state": "running" if is_running else "finished" if is_finished(record, trials) else "interrupted",
        "num_ended": sum(trial.state not in OPEN for trial in trials),
        "num_trials": record.num_trials(),
        "num_failed": sum(trial.state == TrialState.FAILED for trial in trials),
        "metric": info.spec.search.metric,
        "best": best.best.value if best and best.best else None,
        "created": info.created,
        "damaged": [str(damage) for damage in find_damage(record)],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "fault" in row:
        return row["sweep"], row["state"], "", "", "", ""
    best = "" if row["best"] is None else f"{row['metric']} {number(row['best'])}"
    ended = f"{row['num_ended']}/{row['num_trials']}"
    return row["sweep"], row["state"], ended, str(row["num_failed"] or ""), best, row["created"][:16].replace("T", " ")
