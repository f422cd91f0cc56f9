"""Copy a sweep from an object store into a folder. What is there already, and has not changed, is not fetched again."""

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths, SweepRecord, read_sweep
from orchestrator.record.pulled import write_pulled
from orchestrator.record.sweep_record import LAST_PULLED
from orchestrator.remote.layout import Rank, files_in, is_record, rank_of
from orchestrator.remote.store import RemoteFile, RemoteFolder, patiently

_NUM_FETCHERS = 16
_ATTEMPTS = 5
"""How often files are looked up again that the driver has removed since they were listed."""

_CHANGING = ("trials/", "repeats/", "audit/", ".")
"""Beginnings of names of files that a driver removes. Others, such as a report, may have been made in a pulled copy."""

Wanted = Callable[[str], bool]
"""Whether a file is to be pulled, by its name."""


def pull_records(remote: RemoteFolder, root: Path) -> None:
    """Pull what views of a sweep read, and note in the folder where it is from.

    Raises:
        RecordError: there is no sweep.
        RemoteError: the store refuses it, or does not answer.
    """
    _pull(remote, root, is_record)
    write_pulled(SweepPaths(root), remote.uri)


def pulled_record(remote: RemoteFolder, root: Path) -> SweepRecord:
    """Pull the records of a sweep and read them. Its rows and adapters are pulled when they are first asked for.

    Raises:
        RecordError: there is no sweep, or its record cannot be read.
        RemoteError: the store refuses it, or does not answer.
    """
    pull_records(remote, root)
    record = read_sweep(root)
    return replace(record, fetch=lambda folder: pull_below(remote, record.paths.root, folder))


def pull_below(remote: RemoteFolder, root: Path, folder: Path) -> None:
    """Pull all files of a folder of the sweep, such as an adapter or the rows.

    Raises:
        The same errors as `pull_records`.
    """
    within = f"{folder.relative_to(root).as_posix()}/"
    _pull(remote, root, lambda name: name.startswith(within))


def pull_all(remote: RemoteFolder, root: Path) -> None:
    """Pull the whole sweep, so that it can be resumed here.

    Raises:
        The same errors as `pull_records`.
    """
    _pull(remote, root, lambda _: True)
    for record in root.rglob("sweep.json"):  # a sweep inside the sweep shares its rows by a link
        data = SweepPaths(record.parent).data
        if record.parent != root and not data.exists():
            data.symlink_to(os.path.relpath(SweepPaths(root).data, record.parent))


def _pull(remote: RemoteFolder, root: Path, wanted: Wanted) -> None:
    """Pull files, records first and each folder's last file after the others; remove what is gone from the store."""
    for _ in range(_ATTEMPTS):
        listed = {name: file for name, file in patiently(remote.files).items() if rank_of(name) is not None}
        if "sweep.json" not in listed:
            raise RecordError(
                f"{remote.uri}: there is no such sweep (no sweep.json)",
                f"`orchestrator list --output {remote.uri.rpartition('/')[0]}` shows those that are there.",
            )
        if _fetch_changed(remote, root, {name: file for name, file in listed.items() if wanted(name)}):
            break
    else:
        raise RecordError(f"{remote.uri}: changes faster than it can be pulled", "Pull it once the sweep has ended.")
    for name, path in list(files_in(root)):
        if name not in listed and name.startswith(_CHANGING):
            path.unlink()


def _fetch_changed(remote: RemoteFolder, root: Path, files: dict[str, RemoteFile]) -> bool:
    """Fetch files that differ from those in a folder; return False if one is gone."""
    changed = [name for name, file in files.items() if not _is_equal(root / name, file)]
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".pulling-", dir=root))

    def fetch(name: str) -> bool:
        part = building / name.replace("/", "%")
        if not patiently(lambda: remote.fetch(name, part)):
            return False
        os.utime(part, ns=(files[name].changed_ns, files[name].changed_ns))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        part.replace(root / name)
        return True

    try:
        with ThreadPoolExecutor(_NUM_FETCHERS) as fetchers:
            return all(
                all(fetchers.map(fetch, [name for name in changed if _turn(name) == turn]))
                for turn in sorted({_turn(name) for name in changed})
            )
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _turn(name: str) -> int:
    """Return when a file is fetched: records, folders, the last file of each folder, and then `sweep.json`."""
    if rank_of(name) == Rank.SWEEP:
        return 3
    if PurePosixPath(name).name == LAST_PULLED:
        return 2
    return 1 if rank_of(name) == Rank.FOLDER else 0


def _is_equal(path: Path, file: RemoteFile) -> bool:
    """Return whether a file was pulled since it was written."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (file.size, file.changed_ns)
