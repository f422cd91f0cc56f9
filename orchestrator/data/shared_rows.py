"""Write tokenized rows to disk in small integers, and share equal files with the other sweeps of a folder.

Files are shared by hard links: each sweep's folder stays complete, a copy of it too, and the bytes are freed with the
last sweep that has them. An empty file `rows-DIGEST` in each folder of rows names what they hold.
"""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOENT, errno.ESTALE)
"""Errors of a file that cannot be linked: storage without hard links, another's file, or a sweep that was deleted."""


def id_types(num_ids: int) -> tuple[str, str]:
    """Return the smallest types, as `datasets` names them, of token ids and of labels, which may be -100.

    Args:
        num_ids: size of the vocabulary; all ids are smaller.
    """
    ids = "uint16" if num_ids <= 1 << 16 else "int32"
    return ids, "int16" if num_ids <= 1 << 15 else "int32"


def write_rows(rows: Any, folder: Path, siblings: Path | None) -> None:
    """Write rows into `folder`, which must not exist; link equal files of a sibling instead, if it has them.

    Args:
        rows: a `datasets.Dataset`.
        folder: the target.
        siblings: a folder of sweeps on the same storage; None writes the rows anew.
    """
    name = f"rows-{_digest(rows)}"
    for found in siblings.glob(f"*/data/*/{name}") if siblings is not None else []:
        if _link(found.parent, folder) and _holds(folder, name):
            return
        shutil.rmtree(folder, ignore_errors=True)
    rows.save_to_disk(folder)
    (folder / name).touch()


def _link(source: Path, folder: Path) -> bool:
    """Make `folder` with links to the files of `source`; return False if one cannot be linked."""
    folder.mkdir()
    try:
        for file in source.iterdir():
            os.link(file, folder / file.name, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _holds(folder: Path, name: str) -> bool:
    """Read rows back, and return whether they are those that the name says."""
    from datasets import load_from_disk

    try:
        return f"rows-{_digest(load_from_disk(folder))}" == name
    except (OSError, ValueError, KeyError, TypeError):  # damaged files; arrow's errors are among these
        return False


def _digest(rows: Any) -> str:
    """Return a hash of all columns: their names, types, lengths of rows and values."""
    table, digest = rows.with_format("arrow")[:], hashlib.sha256()
    for name in sorted(table.column_names):
        column = table.column(name)
        digest.update(f"{name} {column.type} {len(column)}".encode())
        # Chunk after chunk: one array of lists holds no more than 2^31 - 1 values.
        for chunk in column.chunks:
            digest.update(chunk.value_lengths().to_numpy().tobytes())
        for chunk in column.chunks:
            digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()
