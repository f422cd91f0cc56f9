"""Copy a driver's sweep to an object store while it runs, so that the store always holds a sweep that can be resumed.

A thread makes rounds. Each round finds what has changed, in the opposite order of that in which it is sent: records are
read before the files that they name are looked up. So what is sent last names only what was sent before, whatever
trials write meanwhile. A round that fails is made again after a pause. What changes during an outage is sent once, as
it is then.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.record import SweepPaths
from orchestrator.remote.holder import Holder, holder_in, own_holder
from orchestrator.remote.layout import COMPARED, Rank, files_in, is_log, rank_of
from orchestrator.remote.location import uri_of
from orchestrator.remote.store import RefusedError, RemoteError, RemoteFolder

Say = Callable[[str], None]

PERIOD_S = 5.0
"""Seconds between two rounds: the lag of the store, besides the time that sending takes."""
LOGS_PERIOD_S = 60.0
"""The same for logs, which are sent as a whole whenever they have grown."""
LONGEST_PAUSE_S = 30.0
"""Longest pause before a round that has failed is made again."""
LAST_ROUNDS_S = 120.0
"""Seconds for which the end of a sweep waits for a store that does not answer."""
_LEAST_S = 1.1
"""Least seconds between two rounds: stores tell times in whole seconds, by which a reader knows that a file changed."""
_NUM_SENDERS = 8

_Signature = tuple[int, int, int]
"""Size, time of change in nanoseconds, and inode: differs once a file was replaced or appended to."""


class TakenOverError(RefusedError):
    """Another driver has resumed the sweep elsewhere, so that this copy of it is no longer mirrored."""


@dataclass(frozen=True)
class _Change:
    """A file that must be sent, as it was when the round began."""

    name: str
    signature: _Signature
    content: bytes | Path
    """Its content; or a link to the file, which keeps it while the trial may remove it."""


@contextmanager
def mirroring(paths: SweepPaths, say: Say) -> Iterator[None]:
    """Copy a sweep to its object store during the block, and once more at its end. Do nothing for any other sweep.

    Args:
        paths: a sweep that has begun.
        say: called with messages, from a thread too.

    Raises:
        RemoteError: the store refuses requests at the start.
        StorageError: at the end, the store lacks files, because it does not answer or refuses them. An exception of the
            block goes first; this is then a message.
    """
    uri = uri_of(paths.root)
    if uri is None:
        yield
        return
    mirror = Mirror(paths.root, RemoteFolder(uri), say)
    say(f"the sweep is copied to {uri}")
    mirror.start()
    try:
        yield
    except BaseException:
        try:
            mirror.finish()
        except StorageError as error:
            say(f"warning: {error}")
        raise
    mirror.finish()


class Mirror:
    """Copies one sweep. `start` begins the rounds, `finish` makes the last one."""

    def __init__(self, root: Path, remote: RemoteFolder, say: Say) -> None:
        self._root = root
        self._remote = remote
        self._say = say
        self._holder: Holder | None = own_holder(root)
        self._links = root / ".mirror"
        self._driver = SweepPaths(root).driver
        """Left out of the last round, because the driver ends with it."""
        self._sent: dict[str, _Signature | None] = {}
        """What the store holds, by name; None for what is out of date or no longer here."""
        self._is_known = False
        """Whether `_sent` has been compared with the store."""
        self._logs_at = 0.0
        """When logs are due again, on the monotonic clock."""
        self._over = threading.Event()
        self._fault: RemoteError | None = None
        """Why the last round failed."""
        self._failing_since = 0.0
        self._error: Exception | None = None
        """What has ended the thread, if that is none of the faults that are expected."""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        """Begin the rounds."""
        self._thread.start()

    def finish(self) -> None:
        """Make the last rounds, until the store holds the sweep as it is now.

        Raises:
            StorageError: the store lacks something.
        """
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._fault is not None:
            raise StorageError(
                f"{self._remote.uri}: lacks the last changes of the sweep, which are in {self._root}: "
                f"{self._fault.message}",
                "Nothing more is copied; that driver goes on."
                if isinstance(self._fault, TakenOverError)
                else f"{self._fault.remedy} Then copy them with: orchestrator resume {self._root}",
            )

    def _run(self) -> None:
        try:
            self._make_rounds()
        except Exception as error:  # raised by `finish`, in the thread of the driver
            self._error = error

    def _make_rounds(self) -> None:
        pause_s = 0.0
        while not self._over.wait(pause_s) and not isinstance(self._fault, TakenOverError):
            pause_s = PERIOD_S if self._try_round() else min(max(2 * pause_s, _LEAST_S), LONGEST_PAUSE_S)
        time.sleep(_LEAST_S)
        deadline, pause_s = time.monotonic() + LAST_ROUNDS_S, _LEAST_S
        while not self._try_round() and not self._is_hopeless() and time.monotonic() + pause_s < deadline:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _is_hopeless(self) -> bool:
        return self._fault is not None and self._fault.is_final

    def _try_round(self) -> bool:
        """Make a round; return whether it succeeded. Say when the store stops answering, and when it answers again."""
        try:
            self.make_round()
        except RemoteError as error:
            self._note(error)
            return False
        except OSError as error:  # of this machine's disk, which the trials meet too
            self._note(RemoteError(f"{self._root}: cannot be read: {error}", "Repair the disk."))
            return False
        if self._fault is not None:
            self._say(f"{self._remote.uri}: copied again after {time.monotonic() - self._failing_since:.0f} s")
            self._fault = None
        return True

    def _note(self, fault: RemoteError) -> None:
        if self._fault is None:
            self._failing_since = time.monotonic()
            self._say(f"warning: the sweep goes on, but its copy waits: {fault.message}")
        self._fault = fault

    def make_round(self) -> None:
        """Send what has changed since the last round, then remove from the store what is gone.

        Raises:
            RemoteError: the store does not take something; the next round sends it.
        """
        if holder_in(self._remote) != self._holder:
            raise TakenOverError(
                f"{self._remote.uri}: another driver has resumed this sweep", "Use the sweep that it writes."
            )
        if not self._is_known:
            self._sent, self._is_known = self._compare(), True
        with_logs = self._over.is_set() or time.monotonic() >= self._logs_at
        present, changes = self._find_changes(with_logs)
        with ThreadPoolExecutor(_NUM_SENDERS) as senders:
            for rank in Rank:
                list(senders.map(self._send, [each for each in changes if rank_of(each.name) == rank]))
            gone = [name for name in self._sent if name not in present]
            list(senders.map(self._delete, gone))
        shutil.rmtree(self._links)
        if with_logs:
            self._logs_at = time.monotonic() + LOGS_PERIOD_S

    def _compare(self) -> dict[str, _Signature | None]:
        """Return what the store holds already. Only files that never change are taken as equal by their size."""
        remote = self._remote.files()
        sent: dict[str, _Signature | None] = {name: None for name in remote if rank_of(name) is not None}
        for name, path in files_in(self._root):
            is_fixed = rank_of(name) == Rank.FOLDER and path.name not in COMPARED
            if is_fixed and name in remote and remote[name].size == path.stat().st_size:
                sent[name] = _signature(path)
        return sent

    def _find_changes(self, with_logs: bool) -> tuple[set[str], list[_Change]]:
        """Return the names of all files, and those that have changed. Begin again if one vanishes meanwhile."""
        while True:
            shutil.rmtree(self._links, ignore_errors=True)
            self._links.mkdir()
            try:
                return self._capture(with_logs)
            except FileNotFoundError:
                if not (self._root / "sweep.json").is_file():  # otherwise all would be removed from the store
                    raise RefusedError(f"{self._root}: the sweep's folder is gone", "Put it back.") from None

    def _capture(self, with_logs: bool) -> tuple[set[str], list[_Change]]:
        present, changes = set[str](), list[_Change]()
        for rank in sorted(Rank, reverse=True):
            for name, path in files_in(self._root):
                if rank_of(name) != rank or (self._over.is_set() and path == self._driver):
                    continue
                present.add(name)
                if is_log(name) and not with_logs:
                    continue
                signature = _signature(path)
                if self._sent.get(name) != signature:
                    content = self._link(path, len(changes)) if rank == Rank.FOLDER else path.read_bytes()
                    changes.append(_Change(name, signature, content))
        if "sweep.json" not in present:
            raise FileNotFoundError(self._root / "sweep.json")
        return present, changes

    def _link(self, path: Path, number: int) -> Path:
        link = self._links / str(number)
        os.link(path, link)
        return link

    def _send(self, change: _Change) -> None:
        if isinstance(change.content, Path):
            self._remote.send(change.content, change.name)
            change.content.unlink()
        else:
            self._remote.write(change.name, change.content)
        self._sent[change.name] = change.signature

    def _delete(self, name: str) -> None:
        self._remote.delete(name)
        del self._sent[name]


def _signature(path: Path) -> _Signature:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
