"""Write files and folders so that they are complete or absent, never half written, also after a power cut.

A rename may reach the disk before the content of what is renamed. Functions here therefore sync the content before they
rename it, and the folder that holds the name after it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import RecordError

BUILDING = ".building-"
"""Prefix of the temporary name of a folder that is being filled."""

REPLACED = ".replaced-"
"""Name prefix of an adapter folder while a new version is being renamed to its place."""


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


def sync(path: Path) -> None:
    """Wait until the disk holds the content of a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until the disk holds all files of a folder and their names. Symbolic links are not followed."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (path := Path(where, name)).is_symlink():
                sync(path)
        sync(Path(where))


def publish(building: Path, folder: Path) -> None:
    """Rename a folder that has been filled to its final name, once the disk holds its content.

    Args:
        building: the filled folder.
        folder: its final name, which is free or that of an empty folder.

    Raises:
        OSError: the storage fails, or the name is taken.
    """
    sync_tree(building)
    building.rename(folder)
    sync(folder.parent)


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
    """Replace `path` in one step: a reader, a crash or a power cut sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as building:
        building.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Make a temporary file next to `path` that replaces it at the end of the block; remove it on any exception.

    At the end, the disk holds the file and its name.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    building = Path(name)
    try:
        os.close(handle)
        yield building
        building.chmod(0o644)
        sync(building)
        building.replace(path)
        sync(path.parent)
    except BaseException:
        building.unlink(missing_ok=True)  # Ctrl-C may come after the file has been renamed
        raise


def link_or_copy(file: Path, other: Path) -> None:
    """Hard-link a file, so that it is not written twice; copy it if the file system has no hard links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


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
