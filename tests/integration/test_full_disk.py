"""A full or failing disk interrupts a trial or a sweep, which can be resumed once there is space."""

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from drivers import command
from test_signals import STEPS, start, wait_for_steps
from tiny import Witness

from orchestrator.adapters import bundle
from orchestrator.errors import StorageError
from orchestrator.record import SweepPaths, TrialState, files, read_metrics, read_sweep
from orchestrator.spec import SweepSpec
from orchestrator.training.local import resume_local_trial, run_local_trial

pytestmark = pytest.mark.slow

Tiny = Callable[..., SweepSpec]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a separate file system of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this process may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_until_it_ends(disk: Path, process: "subprocess.Popen[str]") -> Path:
    """Fill the disk until the process ends, including space that the process frees meanwhile."""
    filler, deadline = disk / "filler", time.monotonic() + 120
    with filler.open("wb", buffering=0) as file:
        while process.poll() is None and time.monotonic() < deadline:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"x" * size)
            time.sleep(0.02)
    return filler


def resume(root: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command("resume", str(root)), capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", ["sweep", "trial"])
def test_a_full_disk_interrupts_and_fails_no_trial(small_disk: Path, verb: str) -> None:
    with start(verb, small_disk, "training.eval_steps=4", "training.save_steps=4") as process:
        record = wait_for_steps(small_disk, process)
        filler = fill_until_it_ends(small_disk, process)
        _, message = process.communicate(timeout=120)
    assert process.returncode == 74, message
    assert "No space left on device" in message
    assert f"orchestrator resume {record.paths.root}" in message
    assert len(message.splitlines()) <= 3, message
    assert {trial.state for trial in record.trials()} <= {TrialState.RUNNING, TrialState.PENDING}
    hidden = {
        path.name for path in record.paths.root.rglob(".*") if path.name not in (".driver.lock", ".lease", ".step")
    }
    assert hidden <= {".validate_storage_marker", ".first-step"}, "something half-written is left"

    still_full = resume(record.paths.root)
    assert still_full.returncode == 74, still_full.stderr
    assert "Traceback" not in still_full.stderr

    filler.unlink()
    done = resume(record.paths.root)
    assert done.returncode == 0, done.stderr
    trials = record.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * (3 if verb == "sweep" else 1)
    for trial in trials:
        points = read_metrics(record.paths.trial(trial.trial_id))
        assert [point.step for point in points if "eval/loss" in point.values] == list(range(4, STEPS + 1, 4))


def fails_once(function: Callable[..., Any], number: int, at: int, concerns: Callable[..., bool]) -> Callable[..., Any]:
    """Return the function, made to fail at its `at`-th call; only calls for which `concerns` is true are counted."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if concerns(*arguments):
            calls += 1
            if calls == at:
                raise OSError(number, os.strerror(number), str(arguments[0]))
        return function(*arguments, **options)

    return call


WRITES: dict[str, tuple[Any, str, int, Callable[..., bool]]] = {
    "metrics": (files, "append_line", 5, lambda path, _: path.name == "metrics.jsonl"),
    "progress": (files, "write_atomic", 3, lambda path, _: path.name == "progress.json"),
    "result": (files, "write_atomic", 1, lambda path, _: path.name == "result.json"),
    "checkpoint": (torch, "save", 3, lambda *_: True),
    "adapter": (bundle, "_fill", 2, lambda *_: True),
}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize("engine", ["fast", "trl"])
@pytest.mark.parametrize("kind", WRITES)
def test_each_kind_of_write_may_fail(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, engine: str, number: int
) -> None:
    if (engine, number) == ("trl", errno.EROFS):
        pytest.skip("the same code as with the other number")
    spec = tiny(f"training.engine={engine}")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    undisturbed = run_local_trial(spec, whole, Witness())
    assert undisturbed is not None
    module, name, at, concerns = WRITES[kind]
    failing = fails_once(getattr(module, name), number, at, concerns)
    with monkeypatch.context() as patched:
        for place in ("orchestrator.record.checked", "orchestrator.tracking.jsonl", module.__name__):
            patched.setattr(f"{place}.{name}", failing, raising=False)
        with pytest.raises(StorageError, match=f"its storage fails: .*{os.strerror(number)}") as raised:
            run_local_trial(spec, broken, Witness())
    assert f"orchestrator resume {broken.root}" in raised.value.remedy
    record = read_sweep(broken.root)
    (interrupted,) = record.trials()
    assert (interrupted.state, interrupted.error) == (TrialState.RUNNING, None)
    assert not list(broken.root.rglob(".building-*"))
    resumed = resume_local_trial(record, Witness())
    assert resumed is not None
    assert (resumed.state, resumed.best, resumed.tokens) == (TrialState.COMPLETE, undisturbed.best, undisturbed.tokens)
    curves = [
        [(point.step, point.values) for point in read_metrics(paths.trial(trial.trial_id))]
        for paths, trial in ((whole, undisturbed), (broken, resumed))
    ]
    assert curves[0] == curves[1]
