"""Local rows: a file of one of the kinds, a folder or a glob of them, or what `save_to_disk` has left."""

import csv
import glob
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.spec.sections import FILE_KINDS, GLOB
from orchestrator.words import counted


@dataclass(frozen=True)
class Row:
    """One example as it was written."""

    values: dict[str, Any]
    where: str
    """`file.jsonl:12`, `array.json:1 row 12`, `file.parquet row 12`, or `hub/id[train] row 12`; lines count from 1,
    rows from 0."""

    def column(self, name: str) -> Any:
        """What stands in a column.

        Raises:
            DataError: there is none of this name.
        """
        if name not in self.values:
            raise DataError(
                f"{self.where}: there is no column {name!r}; columns: {', '.join(map(repr, self.values))}",
                "data.format says which columns are read; format template reads any, named in data.template.",
            )
        return self.values[name]


def read_local(path: Path, split: str | None = None, default: str = "train") -> Iterator[Row]:
    """Rows in their order, read as they are asked for.

    Args:
        path: absolute; a file, a folder, or a glob.
        split: of a saved data set with several.
        default: where no split is asked for.

    Raises:
        DataError: there is none, a split is asked for of what has none, or a row is not what its file's kind says.
    """
    if split is not None and not _has_splits(path):
        raise DataError(f"{path}: has no splits, and split {split} is asked for")
    if _is_saved(path):
        yield from _read_saved(path, split or default)
        return
    for file in data_files(path):
        try:
            yield from _READERS[file.suffix](file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def read_paths(path: Path, split: str) -> list[Path]:
    """What is read of a path, of one with splits of this: its files, or the folder of a saved data set.

    Raises:
        DataError: there is none.
    """
    if _has_splits(path):
        return [path / split]
    return [path] if _is_saved(path) else data_files(path)


def _is_saved(path: Path) -> bool:
    """Whether it is a folder of `save_to_disk`, with splits or without."""
    return _has_splits(path) or (path / "state.json").is_file()


def _has_splits(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def data_files(path: Path) -> list[Path]:
    """The files that a path stands for, sorted.

    Raises:
        DataError: there is none.
    """
    kinds = ", ".join(FILE_KINDS)
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise DataError(f"{path}: is of no known kind: {kinds}")
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in FILE_KINDS and file.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise DataError(f"{path}: the folder holds no data file ({kinds}), and no saved data set")
        return files
    if GLOB.search(str(path)):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 (it leaves hidden files out)
        files = sorted({file for name in found if (file := Path(name)).is_file()})
        if not files:
            raise DataError(f"{path}: no file matches")
        if strange := [file for file in files if file.suffix not in FILE_KINDS]:
            raise DataError(f"{path}: matches {strange[0].name}, which is of no known kind: {kinds}")
        return files
    raise DataError(f"{path}: there is no such data file")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _not_text(path) from error
            if text:
                with _json_errors(where):
                    values = json.loads(text)
                yield _object(values, where)


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects; or, as many files of this ending are, an object a line."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    yield from (_read_array if start.startswith(b"[") else _read_lines)(path)


def _read_array(path: Path) -> Iterator[Row]:
    """An array may be one line: a row is named by that, and by its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path) from error
    decoder, at, line, counted, number = json.JSONDecoder(), text.index("[") + 1, 1, 0, 0
    is_open = False
    while True:
        at = _past_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line} row {number}"
        if is_open and text.startswith("]", at):
            raise DataError(f"{path}:{line}: is not JSON: the array ends with a comma")
        if text.startswith("]", at):
            break
        with _json_errors(where):
            values, at = decoder.raw_decode(text, at)
        yield _object(values, where)
        at = _past_space(text, at)
        if not text.startswith((",", "]"), at):
            raise DataError(f"{where}: is not JSON: the array goes on with neither a comma nor its end")
        is_open = text.startswith(",", at)
        at, number = at + is_open, number + 1
    if rest := text[at + 1 :].strip():
        raise DataError(f"{path}:{line}: is not JSON: after the array stands {rest!r:.40}")


def _read_lines(path: Path) -> Iterator[Row]:
    rows = _read_jsonl(path)
    try:
        first = next(rows, None)
    except DataError as error:
        if _is_json(path):  # but over several lines
            raise DataError(f"{path}: must be an array of objects, or an object a line") from error
        raise DataError(
            error.message, error.remedy or "A .json file is an array of objects, or an object a line."
        ) from error
    if first is not None:
        yield first
        yield from rows


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def _json_errors(where: str) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: is not JSON: {error.msg} ({place})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; lists within lists
        raise DataError(f"{where}: cannot be read: {error}") from error


def _not_text(path: Path) -> DataError:
    """That a file is not UTF-8, with the first line that is not."""
    with path.open("rb") as file:
        number = next(number for number, line in enumerate(file, start=1) if not _is_text(line))
    return DataError(f"{path}:{number}: is not UTF-8 text", "Save the file as UTF-8.")


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _past_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _read_csv(path: Path) -> Iterator[Row]:
    """Values as they are written: all are text. The first row names the columns."""
    csv.field_size_limit(sys.maxsize)
    where = f"{path}:1"
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            if twice := [column for column in columns if columns.count(column) > 1]:
                raise DataError(f"{where}: column {twice[0]!r} is given twice")
            where = f"{path}:{reader.line_num + 1}"
            for fields in reader:
                if fields and len(fields) != len(columns):
                    has = counted(len(fields), "field")
                    raise DataError(f"{where}: has {has}, and the header {len(columns)}: {', '.join(columns)}")
                if fields:  # else an empty line
                    yield Row(dict(zip(columns, fields, strict=True)), where)
                where = f"{path}:{reader.line_num + 1}"  # a row may have several lines
        except UnicodeDecodeError as error:
            raise _not_text(path) from error
        except csv.Error as error:
            raise DataError(f"{where}: is not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    yield Row(without_fillers(values), f"{path} row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not Parquet: {error}") from error


def _read_saved(path: Path, split: str) -> Iterator[Row]:
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


def without_fillers(values: dict[str, Any]) -> dict[str, Any]:
    """A row of a table: what is null within a column's objects is left out, for a table fills in what a row has not."""
    return {name: _without_fillers(value) for name, value in values.items()}


def _without_fillers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_fillers(each) for name, each in value.items() if each is not None}
    return [_without_fillers(each) for each in value] if isinstance(value, list) else value


def _object(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: must be a JSON object, got {json.dumps(values):.40}",
            "A row is an object with a value for each column; an array of rows is a .json file.",
        )
    if broken := [name for name, value in values.items() if not _can_be_written(value)]:
        raise DataError(f"{where}: column {broken[0]!r} holds half a character (an unpaired \\ud800 to \\udfff)")
    return Row(values, where)


def _can_be_written(value: Any) -> bool:
    """Whether JSON's escapes have left no half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
