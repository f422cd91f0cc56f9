"""`--version`, and the two ways to start the command line with Python."""

import subprocess
import sys

import pytest

from orchestrator import __version__


@pytest.mark.parametrize("module", ["orchestrator", "orchestrator.cli"])
def test_the_version_is_printed(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"orchestrator {__version__}\n"
