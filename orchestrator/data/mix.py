"""Rows of several sources: how many of each, and which are held out."""

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
from orchestrator.spec.sections import DataSection, Source
from orchestrator.words import counted


@dataclass(frozen=True)
class Mixed:
    """Rows of all sources, as they were read."""

    rows: list[Row]
    """Training rows, and the held-out ones where these are taken from them."""
    held_out: list[Row]
    """Held-out rows of sources of their own."""
    sources: list[SourceRows]
    """Where `rows` come from."""


def read_mixed(data: DataSection) -> Mixed:
    """Read and mix the sources of a data section.

    Raises:
        DataError: a source cannot be read, or is among the training rows and the held-out ones.
    """
    held_out = data.held_out
    _require_apart(data.sources, held_out.sources)
    rows, sources = _mixed(data.sources, data)
    _require_optional(rows, data)
    return Mixed(rows, _mixed(held_out.sources, data)[0] if held_out.sources else [], sources)


def held_out_places(num_rows: int, data: DataSection) -> set[int]:
    """Which of so many rows are held out, by the data section alone.

    Raises:
        DataError: no row is left to train on.
    """
    held_out = data.held_out
    num_held_out = held_out.count or max(1, round((held_out.share or 0) * num_rows))
    if num_held_out >= num_rows:
        raise DataError(
            f"data.held_out takes {num_held_out} of {counted(num_rows, 'row')}: none is left to train on",
            "Hold fewer out, give more rows, or held-out rows of their own: data.held_out.source.",
        )
    order = list(range(num_rows))
    random.Random(data.seed).shuffle(order)
    return set(order[:num_held_out])


def numbers_of(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows to take of each source: as many as there are in these shares, and no row twice."""
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    # Of a share's fraction of a row the nearest whole one, and never none.
    return [min(size, max(1, round(total * weight))) for size, weight in zip(sizes, weights, strict=True)]


def _mixed(sources: Sequence[Source], data: DataSection) -> tuple[list[Row], list[SourceRows]]:
    """Rows of all sources. A source without the columns is refused first: its number of rows says nothing."""
    each = [_read(source, data) for source in sources]
    weights = [source.weight for source in sources if source.weight is not None]
    numbers = numbers_of([len(rows) for rows in each], weights) if weights else [len(rows) for rows in each]
    mixed: list[Row] = []
    told = []
    for place, (source, rows, number) in enumerate(zip(sources, each, numbers, strict=True)):
        chosen = sorted(random.Random(f"{data.seed} {place}").sample(range(len(rows)), number))
        mixed += [rows[i] for i in chosen]
        told.append(SourceRows(source=source.source, weight=source.weight, num_read=len(rows), num_taken=number))
    return mixed, told


def _read(source: Source, data: DataSection) -> list[Row]:
    """Rows of a source. A column that only some of them lack is a fault of those.

    Raises:
        DataError: the source cannot be read, or no row has a column that the format needs.
    """
    rows = read_rows(source, data.seed)
    if data.format == "messages" and any(in_two_columns(row.values) for row in rows):
        return rows
    for column in data.columns:
        if not any(column in row.values for row in rows):
            rows[0].column(column)
    return rows


def _require_optional(rows: Sequence[Row], data: DataSection) -> None:
    """Refuse a template's optional column that no row has: its name is wrong."""
    missing = data.optional_columns.difference(*(row.values for row in rows))
    if missing:
        known = ", ".join(map(repr, rows[0].values))
        raise DataError(
            f"data.template: no row has a column {min(missing)!r}; columns: {known}", "Mend its name in the template."
        )


def _require_apart(train: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Refuse a file or a saved data set that is in both, or twice in one: as itself, in a folder, or by a glob."""
    training = _paths(train, "data")
    for path, (named, _) in _paths(held_out, "data.held_out").items():
        if path in training:
            raise DataError(
                f"data.held_out: {named} is among the training rows ({training[path][1]})",
                "The trials would be scored on what they learned: keep held-out rows out of what is trained on.",
            )


def _paths(sources: Sequence[Source], section: str) -> dict[Path, tuple[Path, str]]:
    """What is read on this machine, each once: as it is named, and the source that it belongs to."""
    found: dict[Path, tuple[Path, str]] = {}
    for source in sources:
        if not source.is_local or source.source == "embedded":
            continue
        for path in read_paths(Path(source.source), source.split or source.default_split):
            first, other = found.setdefault(path.resolve(), (path, source.source))
            if (first, other) != (path, source.source):
                raise DataError(
                    f"{section}: {path} ({source.source}) is read already as {first} ({other})",
                    "Each row is used once: keep the file out of one of the two.",
                )
    return found
