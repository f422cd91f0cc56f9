"""`status`, `list`, `board`, and `resume` of a finished sweep."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from orchestrator.cli import look
from orchestrator.cli.look import board, status, watch
from orchestrator.cli.train import resume
from orchestrator.errors import RequestError
from orchestrator.record import TrialResult, is_finished, read_sweep, write_record
from orchestrator.record.checked import read_record
from orchestrator.record.lock import driver_state, only_driver
from orchestrator.report.live import SweepView
from tests.unit.conftest import MakeSweep

OPEN_SWEEP = {"a": ("COMPLETE", 0.5), "b": ("RUNNING", 0.7)}


def test_status_tells_a_dead_sweep_from_a_living_one(
    tmp_path: Path, make_sweep: MakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_sweep(tmp_path / "s", OPEN_SWEEP, num_trials=2)
    three_minutes_ago = time.time() - 180
    for file in [paths.sweep, *paths.root.glob("trials/*/*.json")]:
        os.utime(file, (three_minutes_ago, three_minutes_ago))
    with only_driver(paths):
        status(str(paths.root))
        assert f"running on {socket.gethostname()} (process {os.getpid()}), last sign 0s ago" in capsys.readouterr().out
    assert not paths.driver.exists()
    status(str(paths.root))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"no driver is running, last sign 3m00s ago; resume with: orchestrator resume {paths.root}"


def test_status_says_that_only_paused_trials_are_left(
    tmp_path: Path, make_sweep: MakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_sweep(tmp_path / "s", OPEN_SWEEP, num_trials=2)
    said = f"only 1 paused trial left: b; have them go on with: orchestrator go-on {paths.root}/b"
    paths.trial("b").held.touch()
    with only_driver(paths):
        status(str(paths.root))
        assert said not in capsys.readouterr().out, "it still trains"
        paths.trial("b").paused.touch()
        status(str(paths.root))
        assert said in capsys.readouterr().out
        status(str(paths.root), as_json=True)
        assert json.loads(capsys.readouterr().out)["only_paused"] == ["b"]


def test_a_killed_driver_is_dead_here_at_once_and_on_another_machine_after_a_minute(
    tmp_path: Path, make_sweep: MakeSweep
) -> None:
    paths = make_sweep(tmp_path / "s", OPEN_SWEEP)
    paths.driver_lock.touch()
    paths.driver.write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))  # left by a kill
    assert not driver_state(paths).is_running
    paths.driver.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert driver_state(paths).is_running
    for file in [paths.sweep, paths.driver, *paths.root.glob("trials/*/*")]:
        os.utime(file, (time.time() - 70, time.time() - 70))
    assert not driver_state(paths).is_running


def test_a_driver_touches_its_file_while_it_runs(
    tmp_path: Path, make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_sweep(tmp_path / "s", OPEN_SWEEP)
    monkeypatch.setattr("orchestrator.record.lock._BEAT_S", 0.05)
    with only_driver(paths):
        os.utime(paths.driver, (1, 1))
        deadline = time.monotonic() + 10
        while paths.driver.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert paths.driver.stat().st_mtime > 1


def test_status_has_totals(tmp_path: Path, make_sweep: MakeSweep, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5), "b": ("FAILED", None)}, num_trials=2)
    file = paths.trial("a").result
    used = {"tokens": 1234567, "gpu_seconds": 5400.0}
    write_record(file, read_record(TrialResult, file).model_copy(update=used))
    status(str(paths.root))
    *_, totals, state = capsys.readouterr().out.splitlines()
    assert totals == "2 of 2 trials ended (1 COMPLETE, 1 FAILED), 1,234,567 tokens, 1.5 GPU-hours, 0s of work"
    assert state == "finished"
    status(str(paths.root), as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert (document["tokens"], document["gpu_hours"], document["is_running"]) == (1234567, 1.5, False)
    assert document["is_finished"]


def test_watch_follows_a_sweep_until_its_driver_ends(
    tmp_path: Path, make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_sweep(tmp_path / "s", OPEN_SWEEP, num_trials=2)
    driver = only_driver(paths)
    driver.__enter__()
    seen = []

    def update(_: SweepView, trials: object) -> None:
        seen.append(trials)
        driver.__exit__(None, None, None)

    monkeypatch.setattr(SweepView, "update", update)
    watch(str(paths.root))
    assert len(seen) == 1
    assert "no driver is running" in capsys.readouterr().out


def test_repeats_of_finalists_are_shown_and_counted(
    tmp_path: Path, make_sweep: MakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)}, num_trials=1)
    make_sweep(paths.repeats, {"again": ("COMPLETE", 0.52), "more": ("FAILED", None)}, num_trials=3)
    status(str(paths.root))
    printed = capsys.readouterr().out
    assert "the finalists again, with other seeds" in printed
    assert any(line.startswith("again") for line in printed.splitlines())
    assert "other seeds: 2 of 3 trials ended (1 COMPLETE, 1 FAILED)" in printed
    assert "more FAILED at step" in printed
    status(str(paths.root), as_json=True)
    assert [each["trial_id"] for each in json.loads(capsys.readouterr().out)["repeats"]] == ["again", "more"]


def test_list_shows_all_sweeps_the_damaged_too(
    tmp_path: Path, make_sweep: MakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sweep(tmp_path / "done", {"a": ("COMPLETE", 0.5), "b": ("FAILED", None)}, num_trials=2)
    running = make_sweep(tmp_path / "running", OPEN_SWEEP, num_trials=2)
    make_sweep(tmp_path / "dead", OPEN_SWEEP, num_trials=2)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "sweep.json").write_text("{")
    with only_driver(running):
        look.list(output=str(tmp_path))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["sweep", "state", "ended", "failed", "best", "created"]
    states = {row[0]: row[1:4] for row in rows[1:]}
    assert states["done"] == ["finished", "2/2", "1"]
    assert states["running"][:2] == ["running", "1/2"]
    assert states["dead"][:2] == ["interrupted", "1/2"]
    assert states["damaged"] == ["damaged"]
    look.list(output=str(tmp_path / "none"))
    assert capsys.readouterr().out == f"there are no sweeps in {tmp_path / 'none'}\n"


def test_resume_of_a_finished_sweep_prints_its_result_and_starts_nothing(
    tmp_path: Path, make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it would start Ray")

    monkeypatch.setattr("orchestrator.sweep.resume_sweep", refuse, raising=False)
    monkeypatch.setattr("orchestrator.cli.train.show_best", lambda console, _: console.print("the best"))
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5), "b": ("STOPPED", 0.6)}, num_trials=2)
    resume(str(paths.root))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{paths.root}: is finished; nothing is left to run\n")
    assert printed.endswith("the best\n")
    more = make_sweep(tmp_path / "more", {"a": ("COMPLETE", 0.5), "b": ("STOPPED", 0.6)}, num_trials=3)
    assert not is_finished(read_sweep(more.root))
    with pytest.raises(AssertionError, match="it would start Ray"):
        resume(str(more.root))


def test_board_on_a_used_port_names_the_option(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "s", {})
    paths.tensorboard.mkdir()
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port}: cannot be used: .*\n.*--port 0 picks a free one"):
            board(str(paths.root), port=port)
