"""Pull a sweep from an object store, with the adapters that are asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from orchestrator.deploy.finished import FinishedSweep
from orchestrator.errors import RequestError
from orchestrator.record import SweepPaths, SweepRecord
from orchestrator.record.absent import read_absent
from orchestrator.record.pulled import read_pulled
from orchestrator.remote.pull import pulled_record
from orchestrator.remote.store import RemoteFolder
from orchestrator.words import counted


def pull_sweep(
    uri: str, folder: Path, adapters: Literal["best", "all", "none"] = "best", rows: bool = False
) -> Iterator[str]:
    """Pull a sweep into a folder, and yield a line for each thing that is there then.

    Args:
        uri: the sweep's URI.
        folder: a new folder, or one into which the sweep was pulled before.
        adapters: which adapters to pull, besides those that are there.
        rows: whether to pull the tokenized rows.

    Raises:
        RequestError: the folder holds something else, or cannot be written.
        RecordError: there is no such sweep.
        RemoteError: the store refuses it, or does not answer.
    """
    root, remote = folder.resolve(), RemoteFolder(uri)
    _require_own(root, uri)
    try:
        record = pulled_record(remote, root)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written: {error}", "Name another folder with --to.") from error
    yield f"{folder}: records of {counted(len(record.trials()), 'trial')}"
    if rows:
        yield f"{record.rows()}: tokenized rows"
    for adapter in _pull_adapters(record, adapters):
        yield f"{adapter}: adapter"


def _pull_adapters(record: SweepRecord, adapters: Literal["best", "all", "none"]) -> Iterator[Path]:
    finished = record.finished()
    if adapters == "best" and finished:
        yield FinishedSweep(record).best().adapter
    elif adapters == "all":
        removed = read_absent(record.paths)
        yield from (record.adapter(trial) for trial in finished if trial.trial_id not in removed)


def _require_own(root: Path, uri: str) -> None:
    """Check that a folder is new, empty, or was pulled from this URI."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    pulled = read_pulled(SweepPaths(root)) if root.is_dir() else None
    if pulled is None or pulled.uri != uri:
        what = "is there already, and is no copy of it" if pulled is None else f"is a copy of {pulled.uri}"
        raise RequestError(f"{root}: {what}; {uri} is not pulled into it", "Name another folder with --to.")
