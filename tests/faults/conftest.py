"""Hooks of the fault tests: a marker for each, and the table at the end."""

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killer import LIMIT_S, RunningSweep, Values, curves
from outcome import VARIABLE, read_outcomes, table

HERE = Path(__file__).parent

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test of this folder: `make test-faults` runs them, and no other target does."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of outcomes, if the environment names a file."""
    if name := os.environ.get(VARIABLE):
        terminalreporter.section("faults")
        for line in table(read_outcomes(Path(name))):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[Values]]:
    """The curves of the same sweep without a fault."""
    sweep = RunningSweep(tmp_path_factory.mktemp("undisturbed"))
    assert sweep.finish(time.monotonic() + LIMIT_S) == 0, sweep.tail()
    assert sweep.record is not None
    return curves(sweep.record)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of two nodes with one core each."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)))
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()
