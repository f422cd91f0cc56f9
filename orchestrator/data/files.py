"""Read rows from local files: a file, a folder, a glob, or a data set saved by `save_to_disk`."""

import glob
import zlib
from collections.abc import Iterator
from pathlib import Path

from orchestrator.data.json_rows import read_json, read_jsonl
from orchestrator.data.row import Row
from orchestrator.data.tables import read_csv, read_parquet, read_saved, read_text
from orchestrator.errors import DataError
from orchestrator.spec.sections import COMPRESSED, FILE_KINDS, GLOB, file_kind

_KINDS = f"{', '.join(FILE_KINDS)}; all but .parquet also with {', '.join(COMPRESSED)}"


def read_local(
    path: Path, split: str | None = None, default: str = "train", delimiter: str | None = None
) -> Iterator[Row]:
    """Yield rows in their order; files are read as rows are requested.

    Args:
        path: absolute; a file, a folder, or a glob.
        split: split of a saved data set.
        default: the split that is read if none is requested.
        delimiter: character between the fields of CSV files; default a comma, or a tab in TSV files.

    Raises:
        DataError: there is no such path, it has no splits although one is requested, or a file cannot be parsed.
    """
    if split is not None and not _has_splits(path):
        raise DataError(f"{path}: has no splits, but split {split} is requested; leave data.split out")
    if _is_saved(path):
        yield from read_saved(path, split or default)
        return
    for file in data_files(path):
        try:
            yield from _read_file(file, delimiter)
        except (OSError, EOFError, zlib.error) as error:  # the last two: a truncated compressed file
            raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_paths(path: Path, split: str) -> list[Path]:
    """Return the files that are read for a path, or the folder of a saved data set.

    Args:
        path: as in `read_local`.
        split: the split that is read, if the path has splits.

    Raises:
        DataError: there is no file.
    """
    if _has_splits(path):
        return [path / split]
    return [path] if _is_saved(path) else data_files(path)


def data_files(path: Path) -> list[Path]:
    """Return the files that a path stands for, sorted. Text files of a folder count only if it has no other kind.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        if file_kind(path) is None:
            raise DataError(f"{path}: is of no known kind; use one of {_KINDS}")
        return [path]
    if path.is_dir():
        return _files_of_folder(path)
    if GLOB.search(str(path)):
        files = matching_files(path)
        if not files:
            raise DataError(f"{path}: no file matches")
        if strange := [file for file in files if file_kind(file) is None]:
            raise DataError(f"{path}: matches {strange[0].name}, which is of no known kind; use one of {_KINDS}")
        return files
    raise DataError(f"{path}: there is no such data file")


def matching_files(pattern: Path) -> list[Path]:
    """Return the files that match a glob, sorted; none if there is none."""
    found = glob.glob(str(pattern), recursive=True)  # noqa: PTH207 (it skips hidden files, Path.glob does not)
    return sorted({file for name in found if (file := Path(name)).is_file()})


def _files_of_folder(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file_kind(file) is not None and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise DataError(f"{folder}: the folder contains no data file ({_KINDS}) and no saved data set")
    return [file for file in files if file_kind(file) != ".txt"] or files  # otherwise a README would become rows


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`, with splits or without."""
    return _has_splits(path) or (path / "state.json").is_file()


def _has_splits(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def _read_file(path: Path, delimiter: str | None) -> Iterator[Row]:
    match file_kind(path):
        case ".jsonl" | ".ndjson":
            return read_jsonl(path)
        case ".json":
            return read_json(path)
        case ".csv":
            return read_csv(path, delimiter or ",")
        case ".tsv":
            return read_csv(path, delimiter or "\t")
        case ".txt":
            return read_text(path)
        case ".parquet":
            return read_parquet(path)
    raise AssertionError(f"{path}: data_files returns only known kinds")
