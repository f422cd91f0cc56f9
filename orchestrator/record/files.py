"""Write files and folders so that they are complete or absent, never half written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import RecordError

BUILDING = ".building-"
"""Prefix of the temporary name of a folder that is being filled."""


def refuse_links(folder: Path) -> None:
    """Check that a folder contains no symbolic link: copying or sending it would include what the link points to.

    Raises:
        RecordError: it contains one.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise RecordError(
                f"{path}: is a symbolic link to {path.readlink()}, which is not a part of this folder",
                f"Put the file itself in its place; `cp -rL {folder} COPY` does that for all links.",
            )


@contextmanager
def building_beside(folder: Path) -> Iterator[Path]:
    """Make a temporary folder next to `folder`, to be filled and then renamed to it; remove it on any exception.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=BUILDING))
    try:
        building.chmod(0o755)
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader, or a crash, sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as building, building.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Make a temporary file next to `path` that replaces it at the end of the block; remove it on any exception."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    building = Path(name)
    try:
        os.close(handle)
        yield building
        building.chmod(0o644)
        building.replace(path)
    except BaseException:
        building.unlink(missing_ok=True)  # Ctrl-C may come after the file has been renamed
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a file: all of it, or nothing if the disk is full."""
    rest = f"{line}\n".encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.fstat(file).st_size
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file, end)
            raise
    finally:
        os.close(file)
