"""Allow one driver for each sweep: a second one would write into the same trials. Tell whether a driver runs."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from filelock import FileLock, Timeout

from orchestrator.documents import read_text
from orchestrator.errors import RequestError
from orchestrator.record.files import write_atomic
from orchestrator.record.models import Record
from orchestrator.record.paths import SweepPaths

_own_session: list[int | str] = [0, ""]
"""Process and name of its session: a child process must not take over the name of its parent."""

_BEAT_S = 5.0
"""Seconds between two signs of life of a driver."""
_SILENCE_S = 60.0
"""Seconds without a sign after which a driver on another machine counts as dead."""
_PULLED_SILENCE_S = 180.0
"""The same for a sweep that was pulled: an object store gets the signs between the files of a round of copying."""
_PROBE_S = 1.0
"""Longest time for which a new driver waits for a lock, which `driver_state` takes for a moment."""


class DriverInfo(Record):
    """The process that runs a sweep."""

    host: str
    pid: int
    session: str | None = None
    """Value of `SESSION_VARIABLE` in the environment of the Ray that the driver has started on its machine."""
    began: float | None = None
    """Time at which it took the sweep, in seconds since 1970."""


SESSION_VARIABLE = "ORCHESTRATOR_SESSION"
"""Environment variable by which the Ray processes of a killed driver are known."""


@dataclass(frozen=True)
class DriverState:
    """Whether a driver runs a sweep, as far as its files tell."""

    is_running: bool
    driver: DriverInfo | None
    """The driver that runs, or the last one if it was killed."""
    silent_s: float
    """Seconds since the last sign of life: of the driver, or of a trial."""


@contextmanager
def only_driver(paths: SweepPaths) -> Iterator[DriverInfo | None]:
    """Hold the sweep for this process. The lock ends with the process, however it ends.

    Yields:
        The driver that held the sweep before, if it was killed.

    Raises:
        RequestError: another process holds the sweep, or its folder cannot be written to.
    """
    lock = FileLock(paths.driver_lock, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(timeout=_PROBE_S)
    except Timeout:
        raise RequestError(
            f"{paths.root}: another process is running this sweep",
            f"`orchestrator status {paths.root}` shows how far it is.",
        ) from None
    except OSError as error:
        raise RequestError(
            f"{paths.root}: cannot be written: {error.strerror}",
            "A sweep that continues writes into its folder: make it writable, or copy it and resume the copy.",
        ) from error
    over, killed = threading.Event(), _read_driver(paths)
    own = DriverInfo(host=socket.gethostname(), pid=os.getpid(), session=session(), began=time.time())
    with suppress(OSError):  # on a full disk the lock alone tells that this process runs the sweep
        write_atomic(paths.driver, own.model_dump_json())
    threading.Thread(target=_beat, args=(paths, over), name="heartbeat", daemon=True).start()
    try:
        yield killed
    finally:
        over.set()
        with suppress(OSError):
            paths.driver.unlink()
        lock.release()


def session() -> str:
    """Return the name of this process's session."""
    if _own_session[0] != os.getpid():
        _own_session[:] = [os.getpid(), uuid.uuid4().hex]
    return str(_own_session[1])


@contextmanager
def marking_children() -> Iterator[None]:
    """Have processes that start in this block, and their children, carry the name of this process's session.

    Other processes that the same program starts, such as another Ray, must not: `resume` ends those that carry it.
    """
    before = os.environ.get(SESSION_VARIABLE)
    os.environ[SESSION_VARIABLE] = session()
    try:
        yield
    finally:
        del os.environ[SESSION_VARIABLE]
        if before is not None:
            os.environ[SESSION_VARIABLE] = before


def driver_state(paths: SweepPaths) -> DriverState:
    """Tell whether a driver runs the sweep: by its lock, else by its last sign of life.

    The sign decides about a driver on another machine, because not every shared file system passes locks on, and for an
    account that may not write into the sweep's folder, because it cannot try the lock.
    """
    driver, silent_s = _read_driver(paths), max(time.time() - _last_sign(paths), 0.0)
    if paths.pulled.is_file():  # a copy: nobody locks it, on whatever machine the driver runs
        return DriverState(driver is not None and silent_s < _PULLED_SILENCE_S, driver, silent_s)
    is_locked = _is_locked(paths)
    sign_decides = is_locked is None or (driver is not None and driver.host != socket.gethostname())
    is_running = bool(is_locked) or (sign_decides and driver is not None and silent_s < _SILENCE_S)
    return DriverState(is_running, driver, silent_s)


def _beat(paths: SweepPaths, over: threading.Event) -> None:
    while not over.wait(_BEAT_S):
        with suppress(OSError):  # shared storage may fail for a moment
            os.utime(paths.driver)


def _is_locked(paths: SweepPaths) -> bool | None:
    """Return whether a process holds the lock; None where this account cannot try it."""
    if not paths.driver_lock.is_file():
        return False
    lock = FileLock(paths.driver_lock, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # the folder cannot be written to
        return None
    lock.release()
    return False


def _read_driver(paths: SweepPaths) -> DriverInfo | None:
    try:
        return DriverInfo.model_validate_json(read_text(paths.driver))
    except (OSError, ValueError):
        return None


def _last_sign(paths: SweepPaths) -> float:
    """Return when a driver or a trial last wrote something, in seconds since 1970."""
    names = ("progress.json", "metrics.jsonl", ".step", "result.json")
    files = [paths.sweep, paths.driver, paths.decisions]
    files += [paths.trial(trial_id).root / name for trial_id in paths.trial_ids() for name in names]
    times = [0.0]
    for file in files:
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)
