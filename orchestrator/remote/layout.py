"""Which files of a sweep's folder are copied, and in which order, so that no copied record names an absent file."""

import os
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path, PurePosixPath

_HIDDEN = frozenset({".driver.json", ".paused", ".step"})
"""Hidden files that others need. All others belong to processes of this machine, or are incomplete."""

_FOLDERS = frozenset({"adapters", "checkpoints", "exploit_checkpoints", "initial_adapter", "data", "tune"})
_LOGS = frozenset({"tensorboard", "workers"})
_LOG_SUFFIXES = (".txt", ".log")

COMPARED = ("held_out.json", "manifest.json")
"""Files of an adapter that the choice of the best one reads; they are pulled with the records."""


class Rank(IntEnum):
    """When a file is sent: those of a lower rank first. Records name only files of lower ranks."""

    FOLDER = 0
    """Adapters, checkpoints, rows and logs: written once, or only appended to."""
    LINES = 1
    """Lines of metrics, decisions and faults."""
    RECORD = 2
    """All other records."""
    RESULT = 3
    """Results of trials."""
    STATE = 4
    """State of the search. A resume finds results that are newer than it."""
    SWEEP = 5
    """`sweep.json`: without it there is no sweep."""


def rank_of(name: str) -> Rank | None:
    """Return the rank of a file by its path relative to the sweep's folder; None if it is not copied."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts[:-1]):
        return None
    if path.name.startswith(".") and path.name not in _HIDDEN:
        return None
    if len(path.parts) > 1 and path.parts[-2] == "tune":
        return None  # Tune's present state; `tune-snapshot.zip` is the complete one
    if _FOLDERS & {*path.parts[:-1]} or is_log(name):
        return Rank.FOLDER
    if path.suffix == ".jsonl":
        return Rank.LINES
    return {
        "result.json": Rank.RESULT,
        "tune-snapshot.zip": Rank.STATE,
        "tune-snapshot-before.zip": Rank.STATE,
        "sweep.json": Rank.SWEEP,
    }.get(path.name, Rank.RECORD)


def is_log(name: str) -> bool:
    """Return whether a file is a log: it grows all the time, and nothing depends on it."""
    path = PurePosixPath(name)
    return not _FOLDERS & {*path.parts[:-1]} and (path.parts[0] in _LOGS or path.suffix in _LOG_SUFFIXES)


def is_record(name: str) -> bool:
    """Return whether views of a sweep read a file: any record, or the files by which adapters are compared."""
    rank = rank_of(name)
    if rank == Rank.FOLDER:
        return PurePosixPath(name).name in COMPARED and "adapters" in PurePosixPath(name).parts
    return rank not in (None, Rank.STATE)


def files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a sweep that are copied, by their names in the store. Symbolic links are not followed."""
    for where, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for name in names:
            path = Path(where, name)
            relative = path.relative_to(folder).as_posix()
            if rank_of(relative) is not None and not path.is_symlink():
                yield relative, path
