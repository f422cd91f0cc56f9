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
