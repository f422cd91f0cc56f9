"""The memory that a process is said to have held."""

import resource
import sys
from types import SimpleNamespace

import pytest

from orchestrator.training.model.device import peak_memory_gib

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize(("platform", "most"), [("linux", 2**21), ("darwin", 2**31)])
def test_the_peak_of_a_process_is_in_gib_on_each_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, most: int
) -> None:
    """Linux counts it in KiB, macOS in bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=most))
    assert peak_memory_gib() == 2
