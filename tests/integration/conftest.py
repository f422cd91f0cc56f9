"""Fixtures of the integration tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import DEMO, TINY

from orchestrator.record import SweepPaths
from orchestrator.spec import SweepSpec, load_spec

# Results to the digit are those of a CPU; tests/gpu has a process of its own. Before CUDA starts.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def tiny() -> Callable[..., SweepSpec]:
    """`tiny("lora.rank=4", ...)`: the demo experiment, cut down, with overrides."""
    return lambda *overrides: load_spec(DEMO, [*TINY, *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> SweepPaths:
    """A sweep folder that does not exist yet."""
    return SweepPaths(tmp_path / "runs" / "tiny")
