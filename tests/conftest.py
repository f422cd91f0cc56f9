"""Settings of all tests: no network, a key of their own, and the repository as the working directory."""

import os
import time
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ORCHESTRATOR_STATE_KEY"] = "a key of the tests, not of the home folder"
os.chdir(Path(__file__).parents[1])  # tests name files such as experiments/demo.yaml from any working directory

_BEGAN = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip long tests once the minutes of LONG_TESTS_MINUTES are over: CI has a limit, and slow machines reach it.

    What was skipped is printed, and runs with `make test-long`.
    """
    minutes = os.environ.get("LONG_TESTS_MINUTES")
    if minutes and item.get_closest_marker("long") and time.monotonic() - _BEGAN > 60 * float(minutes):
        pytest.skip(f"the {minutes} minutes for long tests are over")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files of long tests take turns in being the first, day by day, where they may not all run."""
    if not os.environ.get("LONG_TESTS_MINUTES"):
        return
    files = list(dict.fromkeys(item.path for item in items))
    first = int(time.time() // 86_400 * 7) % len(files) if files else 0
    order = {path: index for index, path in enumerate(files[first:] + files[:first])}
    items.sort(key=lambda item: order[item.path])
