"""A sweep to look at: in its own folder, or pulled from an object store into a folder of this machine."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import RecordError
from orchestrator.record import SweepRecord, read_sweep
from orchestrator.record.pulled import read_pulled
from orchestrator.remote.location import checked_uri, find_uri, pulled_copy
from orchestrator.remote.pull import pull_records, pulled_record
from orchestrator.remote.store import RemoteError, RemoteFolder, patiently
from orchestrator.spec.output_uri import is_uri

_PERIOD_S = 5.0


def view_sweep(sweep: str | Path, output: str | Path = "runs") -> SweepRecord:
    """Open a sweep by its folder, by its URI, or by its name under `output`. The records of one in a store are pulled.

    An adapter of a sweep in a store is pulled when it is first asked for.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
        RequestError: the URI is none of a supported store.
        RemoteError: the store refuses it, or does not answer.
    """
    uri = find_uri(sweep, output)
    if uri is None:
        return read_sweep(sweep, output)
    return pulled_record(RemoteFolder(uri), pulled_copy(uri))


def view_output(output: str) -> Path:
    """Return a folder of sweeps. The records of all sweeps in a store are pulled into one on this machine.

    Raises:
        RequestError: the URI is none of a supported store.
        RemoteError: the store refuses it, or does not answer.
    """
    if not is_uri(output):
        return Path(output)
    uri = checked_uri(output)
    folder, names = pulled_copy(uri), patiently(RemoteFolder(uri).folders)
    for path in folder.glob("*/"):
        if path.name not in names:
            shutil.rmtree(path)
    for name in names:
        with suppress(RecordError):  # a folder of something else
            pull_records(RemoteFolder(f"{uri}/{name}"), folder / name)
    return folder


@contextmanager
def refreshing(record: SweepRecord) -> Iterator[None]:
    """Pull the records of a sweep again every few seconds, if it was pulled; do nothing for any other sweep."""
    pulled = read_pulled(record.paths)
    if pulled is None:
        yield
        return
    remote, over = RemoteFolder(pulled.uri), threading.Event()

    def refresh() -> None:
        while not over.wait(_PERIOD_S):
            with suppress(RemoteError, RecordError):  # the view says for how long nothing has been heard
                pull_records(remote, record.paths.root)

    thread = threading.Thread(target=refresh, name="refresh", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
