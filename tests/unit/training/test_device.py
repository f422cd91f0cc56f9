"""The reported peak memory of a process."""

import resource
import sys
from types import SimpleNamespace

import pytest

from orchestrator.training.model.device import peak_memory_gib

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize(("platform", "max_rss"), [("linux", 2**21), ("darwin", 2**31)])
def test_peak_memory_is_in_gib_on_each_system(monkeypatch: pytest.MonkeyPatch, platform: str, max_rss: int) -> None:
    """Linux reports KiB, macOS bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=max_rss))
    assert peak_memory_gib() == 2
