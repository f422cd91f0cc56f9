"""Only Ray's processes of one killed driver are ended."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.record import SweepPaths
from orchestrator.record.lock import SESSION_VARIABLE, DriverInfo, marking_children, only_driver, session
from orchestrator.sweep.leftovers import end_leftovers

SLEEP = "import time; time.sleep(60)"


def start(folder: Path, session_: str, is_rays: bool) -> subprocess.Popen[bytes]:
    """Start a process of a session, with a command such as those of Ray's processes or of any other."""
    script = folder / ("ray" if is_rays else "other") / "agent.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SLEEP)
    environment = os.environ | {SESSION_VARIABLE: session_}
    return subprocess.Popen([sys.executable, str(script)], env=environment)


def test_only_rays_processes_of_that_session_are_ended(tmp_path: Path) -> None:
    ours, other, users = (
        start(tmp_path, "killed", True),
        start(tmp_path, "another", True),
        start(tmp_path, "killed", False),
    )
    try:
        killed = DriverInfo(host=socket.gethostname(), pid=1, session="killed")
        assert end_leftovers(killed) == 1
        assert ours.wait(10) is not None  # psutil has taken its code
        assert (other.poll(), users.poll()) == (None, None)
    finally:
        for process in (ours, other, users):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "killed",
    [
        None,
        DriverInfo(host=socket.gethostname(), pid=1),
        DriverInfo(host="elsewhere", pid=1, session="killed"),
    ],
    ids=["ended well", "earlier version", "another machine"],
)
def test_without_a_killed_driver_of_this_machine_nothing_is_ended(tmp_path: Path, killed: DriverInfo | None) -> None:
    process = start(tmp_path, "killed", True)
    try:
        assert end_leftovers(killed) == 0
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_nothing_is_ended_while_the_driver_lives(tmp_path: Path) -> None:
    """The folder may be a copy of a running sweep, with its driver's record."""
    process = start(tmp_path, "copied", True)
    driver = DriverInfo(host=socket.gethostname(), pid=os.getpid(), session="copied", began=time.time())
    try:
        assert end_leftovers(driver) == 0
        assert process.poll() is None
        # This process has begun after that driver took its sweep: it has got the number of a driver that was killed.
        assert end_leftovers(driver.model_copy(update={"began": 1.0})) == 1
    finally:
        process.kill()
        process.wait()


def test_a_new_driver_learns_of_a_killed_one_and_of_no_other(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path)
    with only_driver(paths) as before:
        assert before is None
        own = DriverInfo.model_validate_json(paths.driver.read_text())
        assert own.session == session()
        assert SESSION_VARIABLE not in os.environ, "another Ray of this process must not carry it"
        with marking_children():
            assert os.environ[SESSION_VARIABLE] == session()
        assert SESSION_VARIABLE not in os.environ
    with only_driver(paths) as before:
        assert before is None, "it has ended in good order"
    paths.driver.write_text('{"host": "h", "pid": 4, "session": "s"}')
    with only_driver(paths) as before:
        assert before == DriverInfo(host="h", pid=4, session="s")
