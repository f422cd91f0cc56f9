"""Combine the rows of several sources, and choose which are held out."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.files import read_paths
from orchestrator.data.row import Row
from orchestrator.data.sources import read_rows
from orchestrator.data.turns import in_two_columns
from orchestrator.errors import DataError
from orchestrator.record import SourceRows
from orchestrator.spec.sections import DataSection, HeldOut, Source
from orchestrator.words import counted


@dataclass(frozen=True)
class MixedRows:
    """Rows of all sources, as they were read."""

    rows: list[Row]
    """Training rows; the held-out and test rows too, if they are taken from these."""
    held_out: list[Row]
    """Held-out rows from separate sources."""
    test: list[Row]
    """Test rows from separate sources."""
    sources: list[SourceRows]
    """Sources of `rows`."""


def read_mixed(data: DataSection) -> MixedRows:
    """Read and mix the sources of a data section.

    Raises:
        DataError: a source cannot be read, or provides both training rows and held-out rows.
    """
    held_out, test = data.held_out.sources, data.test.sources if data.test else []
    _require_apart("data.held_out", held_out, data.sources)
    _require_apart("data.test", test, [*data.sources, *held_out])
    rows, sources = _mixed(data.sources, data)
    _require_optional(rows, data)
    apart, test_rows = (_mixed(part, data)[0] if part else [] for part in (held_out, test))
    return MixedRows(rows, apart, test_rows, sources)


def split_indices(num_rows: int, data: DataSection) -> tuple[set[int], set[int]]:
    """Choose which of the training source's rows are held out, and which are test rows.

    The choice depends only on the number of rows and the data section, and held-out rows do not depend on `data.test`.

    Returns:
        The indices of both; empty for a part with sources of its own.

    Raises:
        DataError: no row is left to train on.
    """
    numbers = [_num_taken(part, num_rows) for part in (data.held_out, data.test)]
    if sum(numbers) >= max(num_rows, 1):
        taken = " and ".join(
            f"{name} takes {number}"
            for name, number in zip(("data.held_out", "data.test"), numbers, strict=True)
            if number
        )
        raise DataError(
            f"{taken} of {counted(num_rows, 'row')}: none is left to train on",
            "Hold out fewer rows, add rows, or give separate held-out rows: data.held_out.source.",
        )
    order = list(range(num_rows))
    random.Random(data.seed).shuffle(order)
    return set(order[: numbers[0]]), set(order[numbers[0] : sum(numbers)])


def _num_taken(part: HeldOut | None, num_rows: int) -> int:
    if part is None or part.sources:
        return 0
    return part.count or max(1, round((part.share or 0) * num_rows))


def rows_per_source(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many rows to take from each source: the most that have these shares, with no row used twice."""
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    # A share is rounded to whole rows, but never to none.
    return [min(size, max(1, round(total * weight))) for size, weight in zip(sizes, weights, strict=True)]


def _mixed(sources: Sequence[Source], data: DataSection) -> tuple[list[Row], list[SourceRows]]:
    """Return the rows of all sources. Missing columns are refused before row numbers are computed from the weights."""
    each = [_read(source, data) for source in sources]
    weights = [source.weight for source in sources if source.weight is not None]
    numbers = rows_per_source([len(rows) for rows in each], weights) if weights else [len(rows) for rows in each]
    mixed: list[Row] = []
    records = []
    for place, (source, rows, number) in enumerate(zip(sources, each, numbers, strict=True)):
        chosen = sorted(random.Random(f"{data.seed} {place}").sample(range(len(rows)), number))
        mixed += [rows[i] for i in chosen]
        records.append(SourceRows(source=source.source, weight=source.weight, num_read=len(rows), num_taken=number))
    return mixed, records


def _read(source: Source, data: DataSection) -> list[Row]:
    """Return the rows of a source. If only some rows lack a column, that is a fault of those rows, found later.

    Raises:
        DataError: the source cannot be read, or no row has a column that the format needs.
    """
    rows = read_rows(source, data.seed)
    if data.format == "messages" and any(in_two_columns(row.values) for row in rows):
        return rows
    for column in data.columns:
        if not any(column in row.values for row in rows):
            rows[0].column(column)  # raises
    return rows


def _require_optional(rows: Sequence[Row], data: DataSection) -> None:
    """Refuse a template's optional column that no row has: its name must be wrong."""
    missing = data.optional_columns.difference(*(row.values for row in rows))
    if missing:
        known = ", ".join(map(repr, rows[0].values))
        raise DataError(
            f"data.template: no row has a column {min(missing)!r}; columns: {known}",
            "Correct its name in the template.",
        )


def _require_apart(section: str, part: Sequence[Source], others: Sequence[Source]) -> None:
    """Refuse a file or saved data set that is read twice: by name, in a folder, or by a glob."""
    known = _paths(others, "data")
    for path, (named, _) in _paths(part, section).items():
        if path in known and section == "data.held_out":
            raise DataError(
                f"data.held_out: {named} is among the training rows ({known[path][1]})",
                "Trials would be scored on what they were trained on: keep held-out rows out of the training rows.",
            )
        if path in known:
            raise DataError(
                f"{section}: {named} is among the other rows ({known[path][1]})",
                "The winner would be measured on rows that have chosen it: keep test rows apart.",
            )


def _paths(sources: Sequence[Source], section: str) -> dict[Path, tuple[Path, str]]:
    """Return the files that are read on this machine, resolved -> (as named, the source that it belongs to)."""
    found: dict[Path, tuple[Path, str]] = {}
    for source in sources:
        if not source.is_local or source.source == "embedded":
            continue
        for path in read_paths(Path(source.source), source.split or source.default_split):
            first, other = found.setdefault(path.resolve(), (path, source.source))
            if (first, other) != (path, source.source):
                raise DataError(
                    f"{section}: {path} ({source.source}) is already read as {first} ({other})",
                    "Each row is used once: remove the file from one of the two.",
                )
    return found
