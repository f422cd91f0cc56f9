"""Read rows, each with the place it came from, so that a bad one can be named."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.embedded.task import rows as embedded_rows
from orchestrator.errors import DataError


@dataclass(frozen=True)
class Row:
    """One example as it was written."""

    values: dict[str, Any]
    where: str
    """`file.jsonl:12`, or `hub/id[train] row 12`."""


def read_rows(source: str, config: str | None, split: str, max_rows: int | None) -> list[Row]:
    """Rows of a JSONL file, a hub data set, or the embedded task.

    Args:
        source: absolute path of a JSONL file, hub id, or `embedded`.
        config: configuration of a hub data set.
        split: split of a hub data set.
        max_rows: keep only the first rows.

    Raises:
        DataError: the source cannot be read, a line is not a JSON object, or there is no row.
    """
    if source == "embedded":
        rows = [Row(dict(values), f"embedded:{i + 1}") for i, values in enumerate(embedded_rows())]
    elif Path(source).is_absolute():
        rows = _read_jsonl(Path(source), max_rows)
    else:
        rows = _read_hub(source, config, split, max_rows)
    if not rows:
        raise DataError(f"{source}: holds no row")
    return rows[:max_rows]


def _read_jsonl(path: Path, max_rows: int | None) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such data file")
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if max_rows is not None and len(rows) == max_rows:
                break
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:  # also what is not UTF-8
                raise DataError(f"{path}:{number}: is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise DataError(f"{path}:{number}: must be a JSON object, got {type(values).__name__}")
            rows.append(Row(values, f"{path}:{number}"))
    return rows


def _read_hub(source: str, config: str | None, split: str, max_rows: int | None) -> list[Row]:
    from datasets import load_dataset

    taken = split if max_rows is None else f"{split}[:{max_rows}]"
    try:
        dataset = load_dataset(source, config, split=taken)
    except (
        OSError,
        ValueError,
        ConnectionError,
        RuntimeError,
    ) as error:  # RuntimeError: huggingface_hub's offline mode
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source} (split {split}): cannot be loaded from the hub: {reason}",
            "A local file is given by its path, such as ./rows.jsonl; a hub id as owner/name.",
        ) from error
    return [Row(dict(values), f"{source}[{split}] row {i}") for i, values in enumerate(dataset)]
