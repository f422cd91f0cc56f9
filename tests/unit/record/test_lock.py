import errno
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import RequestError
from orchestrator.record import SweepPaths
from orchestrator.record.lock import only_driver


def test_a_second_driver_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path)
    with (
        only_driver(paths),
        pytest.raises(RequestError, match="another process is running this sweep"),
        only_driver(paths),
    ):
        pass
    with only_driver(paths):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.open", refuse)
    with (
        pytest.raises(
            RequestError, match=f"{tmp_path}: cannot be written: Read-only file system\n  A sweep that continues"
        ),
        only_driver(SweepPaths(tmp_path)),
    ):
        pass


def test_the_lock_of_a_killed_driver_is_released(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from orchestrator.record import SweepPaths\nfrom orchestrator.record.lock import only_driver\n"
        "with only_driver(SweepPaths(Path(sys.argv[1]))):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "locked\n"
    with pytest.raises(RequestError, match="another process is running this sweep"), only_driver(SweepPaths(tmp_path)):
        pass
    driver.kill()
    driver.wait()
    with only_driver(SweepPaths(tmp_path)):
        pass
