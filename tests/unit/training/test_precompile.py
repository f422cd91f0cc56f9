"""Another process compiles the kernels. Its failures are logged and stop no trial."""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import DEMO

from orchestrator.embedded import BASE_DIR
from orchestrator.spec import load_spec
from orchestrator.training.fast.warmup import precompile

BF16 = ["base.compute_dtype=bfloat16", "training.precision=bf16"]


def started(*settings: str) -> "subprocess.Popen[bytes]":
    precompile.start(load_spec(DEMO, settings).corners(), 2)
    assert precompile._running is not None
    return precompile._running[0]


@pytest.mark.parametrize("setting", ["training.engine=trl", "lora.dora=true", "training.optimizer=sgd"])
def test_no_process_starts_for_trials_of_the_trl_engine(setting: str) -> None:
    precompile.start(load_spec(DEMO, [setting]).corners(), 2)
    assert precompile._running is None
    precompile.join()


@pytest.mark.parametrize("setting", ["base.compute_dtype=float32", "lora.rank=512"])
def test_trials_that_no_gpu_can_hold_are_skipped(setting: str, caplog: pytest.LogCaptureFixture) -> None:
    process = started(*BF16, setting)
    precompile.join()
    assert process.returncode == 0
    assert precompile._running is None
    assert not caplog.records


def test_the_process_has_the_same_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(marker)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    started(*BF16, "base.compute_dtype=float32")
    precompile.join()
    assert marker.exists()


def test_an_error_of_the_process_is_logged_and_not_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = json.loads((BASE_DIR / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(document | {"hidden_size": "wide"}), encoding="utf-8")
    started(*BF16, f"base.model={tmp_path}")
    with caplog.at_level(logging.WARNING):
        precompile.join()
    assert "Error" in caplog.text


def test_a_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(precompile, "_TIMEOUT_S", 0.01)
    process = started(*BF16)
    precompile.join()
    assert process.returncode == -signal.SIGKILL
    assert "longer than 0.01 s" in caplog.text


def test_a_second_start_kills_the_first_process() -> None:
    first = started(*BF16)
    second = started(*BF16, "base.compute_dtype=float32")
    assert first.returncode == -signal.SIGKILL
    assert second.poll() is None
    precompile.stop()
    assert second.returncode == -signal.SIGKILL


def test_a_machine_that_cannot_start_a_process_still_trains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(command: Sequence[str], **_: Any) -> None:
        assert command[0] == sys.executable
        raise OSError("no room")

    monkeypatch.setattr(subprocess, "Popen", fails)
    precompile.start(load_spec(DEMO, BF16).corners(), 2)
    precompile.join()
    assert "no room" in caplog.text
