"""End the Ray processes of a driver that was killed: Ray's agents outlive it for a minute (2.60)."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from orchestrator.record import SweepPaths
from orchestrator.record.lock import SESSION_VARIABLE, DriverInfo, only_driver

_WAIT_S = 5.0


@contextmanager
def held(paths: SweepPaths) -> Iterator[None]:
    """Hold a sweep for this process (`only_driver`), after the processes of a killed driver have been ended.

    Raises:
        RequestError: see `only_driver`.
    """
    with only_driver(paths) as killed:
        end_leftovers(killed)
        yield


def end_leftovers(killed: DriverInfo | None) -> int:
    """End the processes of Ray that a killed driver has started on this machine.

    They are known by a random name in their environment, which the driver recorded and gave to its Ray alone, and by
    Ray's own name in their command. Processes on other machines belong to a cluster, and end by themselves. Nothing is
    ended while the driver itself still runs: the record may be in a copy of its sweep.

    Args:
        killed: the driver, from `record.lock.only_driver`; None if it was not killed.

    Returns:
        The number of processes.
    """
    if killed is None or killed.session is None or killed.host != socket.gethostname() or _runs(killed):
        return 0
    found = [process for process in psutil.process_iter() if _belongs_to(process, killed.session)]
    for process in found:
        with suppress(psutil.Error, ProcessLookupError):
            process.send_signal(signal.SIGKILL)  # psutil refuses a process that has got the number of another one
    psutil.wait_procs(found, _WAIT_S)
    return len(found)


def _runs(driver: DriverInfo) -> bool:
    """Return whether a driver's process lives. A process that has got its number since then began after it."""
    try:
        return driver.began is not None and psutil.Process(driver.pid).create_time() <= driver.began
    except psutil.NoSuchProcess:
        return False


def _belongs_to(process: psutil.Process, session: str) -> bool:
    try:
        if process.pid == os.getpid() or process.environ().get(SESSION_VARIABLE) != session:
            return False
        command = " ".join(process.cmdline())
    except (psutil.Error, OSError):  # another user's, or it has just ended
        return False
    return command.startswith("ray::") or f"{os.sep}ray{os.sep}" in command
