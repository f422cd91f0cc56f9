"""Hooks of the fault tests: a marker for each, and the table at the end."""

import os
from pathlib import Path

import pytest
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
