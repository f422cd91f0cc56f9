"""Another process compiles; what it cannot do is told, and harms nobody."""

import logging
from pathlib import Path

import pytest
from tiny import DEMO

from orchestrator.spec import load_spec
from orchestrator.training.fast import ahead


def test_nothing_was_started() -> None:
    ahead.join()


def test_it_is_awaited_once(caplog: pytest.LogCaptureFixture) -> None:
    ahead.start(load_spec(DEMO, ["training.engine=trl"]).corners(), 2)
    assert ahead._running is not None
    process, _ = ahead._running
    ahead.join()
    assert process.returncode == 0
    ahead.join()
    assert not caplog.records


def test_a_fault_there_is_told_and_not_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ahead.start(load_spec(DEMO, [f"base.model={tmp_path}"]).corners(), 2)
    with caplog.at_level(logging.WARNING):
        ahead.join()
    assert "config.json" in caplog.text


def test_one_that_hangs_is_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE_S", 0.01)
    ahead.start(load_spec(DEMO, ["training.engine=trl"]).corners(), 2)
    assert ahead._running is not None
    process, _ = ahead._running
    ahead.join()
    assert process.returncode is not None
