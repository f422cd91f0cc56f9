"""Fixtures of the integration tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import DEMO, TINY

from orchestrator.record import SweepPaths
from orchestrator.spec import SweepSpec, load_spec

# Exact results are those of a CPU, so CUDA is hidden before it starts. tests/gpu runs in another process.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def tiny() -> Callable[..., SweepSpec]:
    """Return a function for a short version of the demo experiment with overrides: `tiny("lora.rank=4", ...)`."""
    return lambda *overrides: load_spec(DEMO, [*TINY, *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> SweepPaths:
    """The paths of a sweep folder that does not exist yet."""
    return SweepPaths(tmp_path / "runs" / "tiny")
