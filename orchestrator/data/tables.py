"""Read rows of tables and of plain text: CSV, Parquet, saved data sets, lines."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestrator.data.open_files import not_text, open_bytes
from orchestrator.data.row import Row, without_fillers
from orchestrator.errors import DataError
from orchestrator.words import counted


def read_text(path: Path) -> Iterator[Row]:
    """Yield each line that is not blank, as the column `text`."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise not_text(path) from error
            if text.strip():
                yield Row({"text": text}, f"{path}:{number}")


def read_csv(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield rows of a CSV file. All values are text. The first row names the columns."""
    csv.field_size_limit(sys.maxsize)
    where = f"{path}:1"
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            columns = next(reader, [])
            _require_once(columns, where)
            where = f"{path}:{reader.line_num + 1}"
            for fields in reader:
                if fields and len(fields) != len(columns):
                    has = counted(len(fields), "field")
                    raise DataError(
                        f"{where}: has {has}, but the header has {len(columns)}: {', '.join(columns)}",
                        f"Quote a field that contains {delimiter!r}, or set data.delimiter if it is another character.",
                    )
                if fields:  # not an empty line
                    yield Row(dict(zip(columns, fields, strict=True)), where)
                where = f"{path}:{reader.line_num + 1}"  # a row may have several lines
        except UnicodeDecodeError as error:
            raise not_text(path) from error
        except csv.Error as error:
            raise DataError(f"{where}: is not CSV: {error}") from error


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield rows of a Parquet file; one batch is in memory at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _require_once(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    yield Row(without_fillers(values), f"{path} row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a nested column appears twice
        raise DataError(f"{path}: is not Parquet: {error}") from error


def read_saved(path: Path, split: str) -> Iterator[Row]:
    """Yield rows of a data set written by `save_to_disk`; `split` says which one, if it has splits."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the saved data set cannot be read: {error}") from error
    name = str(path)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(f"{path}: has no split {split!r}; splits: {', '.join(dataset)}")
        dataset, name = dataset[split], f"{path}[{split}]"
    for number, values in enumerate(dataset):
        yield Row(without_fillers(values), f"{name} row {number}")


def _require_once(columns: list[str], where: str) -> None:
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise DataError(f"{where}: column {twice[0]!r} appears twice", "Rename one of the two, or remove it.")
