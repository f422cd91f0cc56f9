"""Manifests: lists of the files of a folder with their checksums. Checkpoints, rows and adapters have one."""

import hashlib
from pathlib import Path

from pydantic import ConfigDict

from orchestrator.record.checked import DamagedError, read_record, write_record
from orchestrator.record.files import sync_tree
from orchestrator.record.models import Record

MANIFEST = "manifest.json"


class FileChecksum(Record):
    """Checksum and size of a file when its folder was sealed."""

    sha256: str
    size: int
    """Bytes."""

    @classmethod
    def of(cls, path: Path) -> "FileChecksum":
        """Return those of a file's present content."""
        return cls(sha256=sha256_of(path), size=path.stat().st_size)


class FileList(Record):
    """The part of a manifest that lists files. Manifests of adapters have further fields."""

    model_config = ConfigDict(extra="ignore")

    files: dict[str, FileChecksum]
    """All files except the manifest, by their path relative to the folder, with slashes."""


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fault(path: Path, listed: FileChecksum) -> str | None:
    """Return how a file differs from what its manifest lists; None if it does not."""
    if not path.is_file():
        return f"is missing, but {MANIFEST} lists it"
    size = path.stat().st_size
    if size == listed.size and sha256_of(path) == listed.sha256:
        return None
    difference = f"{listed.size} bytes, not {size}" if size != listed.size else "another sha256"
    return f"has changed since it was saved ({MANIFEST} lists {difference})"


def folder_fault(folder: Path) -> str | None:
    """Return what is wrong with a folder by its manifest; None if it is whole."""
    if not folder.is_dir():
        return "is missing"
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"has no {MANIFEST}, so it was not completed or has lost it"
    try:
        files = read_record(FileList, manifest).files
    except DamagedError as error:
        return error.message.removeprefix(f"{folder}/")
    for name, listed in files.items():
        if fault := file_fault(folder / name, listed):
            return f"{name} {fault}"
    return None


def seal_folder(folder: Path) -> None:
    """Write the manifest of a folder, once the disk holds all its files."""
    (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier content
    sync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): FileChecksum.of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_record(folder / MANIFEST, FileList(files=files))
