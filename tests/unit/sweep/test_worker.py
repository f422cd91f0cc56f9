"""The start of a worker, before it trains."""

import subprocess
import sys
import threading
from pathlib import Path
from signal import Signals
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.spec import parse_spec
from orchestrator.sweep.workers import worker as worker_module
from orchestrator.sweep.workers.worker import Worker
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.training.fast.shard.place import Place


class Fetched(Exception):
    """Raised when the rows are fetched."""


def test_a_workers_rows_come_after_its_imports(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would fetch a reference that is an argument at once, and import for it beside the importing thread."""
    imported, order = threading.Event(), []

    def imports() -> None:
        assert imported.wait(60)
        order.append("imports")

    def fetch(reference: Any) -> Any:
        order.append(reference)
        raise Fetched

    monkeypatch.setattr(worker_module, "_import_libraries", imports)
    monkeypatch.setattr(worker_module.ray, "get_gpu_ids", list)
    monkeypatch.setattr(worker_module.ray, "get", fetch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    worker = Worker(parse_spec(document), slots=1, is_fixed=True, gpus=0)

    def open_(data: Any, logs: str) -> None:
        assert not any(value is rows for value in (data, logs)), "Ray would fetch this argument by itself"
        threading.Timer(0.2, imported.set).start()
        with pytest.raises(Fetched):
            worker.open(data, logs)

    rows = object()
    handle = SimpleNamespace(open=SimpleNamespace(remote=open_))
    Workers([handle], [], rows, tmp_path).open(handle)
    assert order == ["imports", [rows]]


def test_a_worker_without_its_group_does_not_open(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would load the whole base."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no shared library")

    monkeypatch.setattr(worker_module, "_import_libraries", lambda: None)
    monkeypatch.setattr("orchestrator.training.fast.shard.base.join_group", fail)
    monkeypatch.setattr(worker_module.ray, "get_gpu_ids", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    place = Place(0, 2, tmp_path / "port")
    worker = Worker(parse_spec(document), slots=1, is_fixed=True, gpus=0, place=place)
    for _ in range(2):
        with pytest.raises(OSError, match="no shared library"):
            worker.open([None], str(tmp_path))
    assert not worker.pulse().is_busy, "an opening that has failed is no hang"


@pytest.mark.parametrize("number", [Signals.SIGTERM, Signals.SIGHUP], ids=lambda each: each.name)
def test_a_signal_reaches_a_worker_whose_main_thread_runs_no_python(number: Signals) -> None:
    """Ray's main thread waits in its own code, where no Python handler of a signal runs."""
    script = (
        "import ctypes, os\n"
        "from orchestrator.sweep.workers.worker import retire_on_signals\n"
        "retire_on_signals(lambda number: os._exit(number + 100))\n"
        "print('ready', flush=True)\n"
        "for _ in range(60): ctypes.CDLL(None).sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(30) == number + 100


def test_a_retired_worker_takes_no_trial(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_import_libraries", lambda: None)
    monkeypatch.setattr(worker_module.ray, "get_gpu_ids", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    worker = Worker(parse_spec(document), slots=1, is_fixed=True, gpus=0)
    asked: list[Any] = []
    pool = SimpleNamespace(has_unread=False)
    runtime = SimpleNamespace(interrupt=lambda *given: asked.append(given), pool=pool, free_slots=lambda: 1)
    worker._runtime = runtime  # type: ignore[assignment]
    assert worker.free_slots() == 1
    worker.retire("its node is about to go away", 3.0)
    assert asked == [(3.0, "its node is about to go away")]
    assert worker.free_slots() == 0
    assert not worker.start("lease", None, None)  # type: ignore[arg-type]
    assert not worker.is_interrupted(), "the sweep goes on"
