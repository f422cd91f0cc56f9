"""Write records with a checksum, and check it when they are read.

A record is JSON that people can read. Its last field, `crc32`, is the checksum of the text before it. A record without
that field is read unchecked: whoever edits a record by hand removes it.
"""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.documents import MAX_LINES_BYTES, DocumentError, read_bytes
from orchestrator.errors import RecordError
from orchestrator.record.files import append_line, write_atomic

_CHECKSUM = re.compile(rb',\s*"crc32": ?"([0-9a-f]{8})"\s*}\s*$')
_EDITED = "If you have edited it, remove its field crc32, which is the checksum of the text before it."

_T = TypeVar("_T", bound=BaseModel)


class DamagedError(RecordError):
    """A record on disk is not what was written, or of another version."""


@dataclass(frozen=True)
class Lines(Generic[_T]):
    """What could be read of a file with one record per line."""

    records: list[_T]
    """All whole records, in order."""
    num_before: int
    """Number of records before the first damage."""
    fault: str | None
    """The first damage; None if there is none. A last line without its end counts as damage."""

    @property
    def is_cut(self) -> bool:
        """Whether nothing is wrong but a last line without its end, as while it is being written."""
        return self.fault == _CUT


_CUT = "its last line is cut"


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record in one atomic step. It must have a field."""
    write_atomic(path, with_checksum(record.model_dump_json(indent=2), "\n  ", "\n}\n"))


def append_record(path: Path, record: BaseModel) -> None:
    """Append a record to a file with one record per line: all of it, or nothing if the disk is full."""
    append_line(path, record_line(record))


def record_line(record: BaseModel) -> str:
    """Return a record as one line, without a line break."""
    return with_checksum(record.model_dump_json(), "", "}")


def with_checksum(document: str, before: str, end: str) -> str:
    """Return a JSON object with its checksum as the last field.

    Args:
        document: a JSON object with a field.
        before: what separates the field from the comma before it.
        end: closes the object.
    """
    body = document[:-1].rstrip()
    return f'{body},{before}"crc32": "{zlib.crc32(body.encode()):08x}"{end}'


def read_record(model: type[_T], path: Path) -> _T:
    """Read a record.

    Raises:
        DamagedError: its checksum does not match, or it does not hold what the model says.
        OSError: it cannot be read.
    """
    try:
        return _parse(model, read_bytes(path))
    except (_Damage, DocumentError) as damage:
        raise DamagedError(f"{path}: is damaged or of another version: {damage}", _EDITED) from damage


def read_lines(model: type[_T], path: Path) -> Lines[_T]:
    """Read a file with one record per line. A missing file has no records.

    Raises:
        DamagedError: it is too large.
        OSError: it cannot be read.
    """
    try:
        *lines, rest = read_bytes(path, MAX_LINES_BYTES).split(b"\n")
    except FileNotFoundError:
        return Lines([], 0, None)
    except DocumentError as error:
        raise DamagedError(f"{path}: is damaged: {error}") from error
    records: list[_T] = []
    num_before, fault = len(lines), None
    for number, line in enumerate(lines, 1):
        try:
            records.append(_parse(model, line))
        except _Damage as damage:
            if fault is None:
                num_before, fault = len(records), f"line {number}: {damage}"
    return Lines(records, min(num_before, len(records)), fault or (_CUT if rest else None))


class _Damage(Exception):
    """What is wrong with the text of a record."""


def _parse(model: type[_T], text: bytes) -> _T:
    if not text:
        raise _Damage("it is empty")
    found = _CHECKSUM.search(text)
    if found:
        body = text[: found.start()]
        if zlib.crc32(body) != int(found[1], 16):
            raise _Damage("its checksum does not match its content")
        text = body + b"}"
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _Damage(f"{where}: {first['msg']}" if where else first["msg"]) from error
