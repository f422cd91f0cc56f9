import errno
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

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(
            RequestError, match=f"{tmp_path}: cannot be written: Read-only file system\n  A sweep that continues"
        ),
        only_driver(SweepPaths(tmp_path)),
    ):
        pass
