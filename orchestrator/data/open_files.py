"""Open files of rows, compressed or not, and refuse what is not text."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import DataError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as bytes; decompress it if its extension says so.

    Raises:
        DataError: it is not compressed as its extension says.
    """
    with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as opened:
        try:
            yield opened
        except (gzip.BadGzipFile, lzma.LZMAError) as error:
            raise DataError(f"{path}: is not compressed as its extension says: {error}") from error


def read_whole(path: Path) -> str:
    """Return a file's text.

    Raises:
        DataError: it is not UTF-8.
    """
    with open_bytes(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise not_text(path) from error


def not_text(path: Path) -> DataError:
    """Return the error for a file that is not UTF-8; it names the first such line."""
    with open_bytes(path) as file:
        number = next(number for number, line in enumerate(file, start=1) if not _is_text(line))
    return DataError(f"{path}:{number}: is not UTF-8 text", "Save the file as UTF-8.")


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
