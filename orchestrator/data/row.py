"""One row as it was written, and the place where it was read."""

from dataclasses import dataclass
from typing import Any

from orchestrator.data.bad_rows import RowError


@dataclass(frozen=True)
class Row:
    """One row as it was written."""

    values: dict[str, Any]
    where: str
    """Place of the row: `file.jsonl:12`, `array.json:1 row 12`, `object.json data[12]`, `file.parquet row 12`, or
    `hub/id[train] row 12`; lines count from 1, rows from 0."""

    def column(self, name: str) -> Any:
        """Return the value in a column.

        Raises:
            RowError: there is no column of this name.
        """
        if name not in self.values:
            raise RowError(
                self.where,
                f"there is no column {name!r}; columns: {', '.join(map(repr, self.values))}",
                "data.format says which columns are read; format template reads any column named in data.template.",
                kind=f"there is no column {name!r}",
            )
        return self.values[name]


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing: null, NaN (a missing value in a data frame), blank text, or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or value in ([], {})


def without_fillers(values: dict[str, Any]) -> dict[str, Any]:
    """Remove nulls from objects in a table's row: tables write null for every key that a row does not have."""
    return {name: _without_fillers(value) for name, value in values.items()}


def _without_fillers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_fillers(each) for name, each in value.items() if each is not None}
    return [_without_fillers(each) for each in value] if isinstance(value, list) else value
