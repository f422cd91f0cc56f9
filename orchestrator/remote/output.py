"""The folder of a new or a resumed sweep: a plain folder, or a driver's copy of a folder in an object store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from orchestrator.errors import RequestError
from orchestrator.record import SweepPaths, SweepRecord, read_sweep
from orchestrator.record.lock import driver_state, only_driver
from orchestrator.record.new_sweep import claim_folder
from orchestrator.remote.holder import hold, holder_in, let_go, own_holder
from orchestrator.remote.location import checked_uri, driver_copy, find_uri, uri_of
from orchestrator.remote.mirror import mirroring
from orchestrator.remote.pull import pull_all
from orchestrator.remote.store import RemoteError, RemoteFolder, patiently
from orchestrator.remote.view import view_sweep
from orchestrator.spec import SweepSpec
from orchestrator.spec.output_uri import is_uri


@contextmanager
def new_sweep(spec: SweepSpec, source: str, name: str | None, output: str | None) -> Iterator[SweepPaths]:
    """Claim the folder of a new sweep, see `claim_folder`; for a URI, that of its copy on this machine.

    A file is written to the store and read back first, so that a wrong bucket or a missing permission is told before
    anything starts.

    Raises:
        RequestError: the folder or the name in the store is taken, or cannot be written.
    """
    folder = output or spec.output.folder
    if not is_uri(folder):
        with claim_folder(spec, source, name, folder) as paths:
            yield paths
        return
    with claim_folder(spec, source, name, str(driver_copy(checked_uri(folder)))) as paths:
        uri = uri_of(paths.root)
        assert uri is not None
        try:
            remote = RemoteFolder(uri)
            if patiently(remote.files):
                raise RequestError(
                    f"{uri}: already exists",
                    f"`orchestrator resume {uri}` continues the sweep there; --name gives the new one another name.",
                )
            patiently(lambda: hold(remote, paths.root))
        except RemoteError as error:
            raise RequestError(f"output {error.message}", error.remedy) from error
        try:
            yield paths
        finally:
            if not paths.sweep.is_file():
                let_go(remote, paths.root)


def sweep_to_resume(sweep: str | Path, output: str | Path) -> SweepRecord:
    """Return the record of a sweep that is to be resumed here. One in a store is pulled first, if this copy is older.

    Raises:
        RecordError: there is no such sweep.
        RequestError: a driver elsewhere runs it.
        RemoteError: the store refuses it, or does not answer.
    """
    uri = find_uri(sweep, output) or uri_of(Path(sweep))
    if uri is None:
        return read_sweep(sweep, output)
    root, remote = driver_copy(uri), RemoteFolder(uri)
    holder = patiently(lambda: holder_in(remote))
    if holder is None or holder != own_holder(root) or not SweepPaths(root).sweep.is_file():
        _take_over(remote, root)
    return read_sweep(root)


def send_rest(record: SweepRecord, say: Callable[[str], None]) -> None:
    """Send what a store lacks of a sweep that has ended here; do nothing for a sweep in a plain folder.

    Raises:
        RequestError: a driver of this machine holds the sweep.
        StorageError: the store refuses it, or does not answer.
    """
    if uri_of(record.paths.root) is not None:
        with only_driver(record.paths), mirroring(record.paths, say):
            pass


def _take_over(remote: RemoteFolder, root: Path) -> None:
    """Pull a sweep whose last driver had another copy of it, and make this one the one that is mirrored.

    An older copy is kept aside: its last changes may be those that the store never got.
    """
    state = driver_state(view_sweep(remote.uri).paths)
    if state.is_running:
        assert state.driver is not None
        raise RequestError(
            f"{remote.uri}: a driver on {state.driver.host} is running this sweep; its last sign of life was "
            f"{state.silent_s:.0f} s ago",
            "Stop it there. If that machine is gone, try again in some minutes.",
        )
    if root.is_dir():
        with only_driver(SweepPaths(root)):
            root.rename(root.with_name(f".{root.name}.older-{datetime.now():%Y%m%d-%H%M%S}"))
    pull_all(remote, root)
    patiently(lambda: hold(remote, root))
