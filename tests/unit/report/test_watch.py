"""`watch` in a real terminal and in a pipe, on a sweep whose records grow while another process holds its lock."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.record import Decision, SweepPaths, TrialResult, read_sweep, write_record
from orchestrator.record.checked import read_record
from orchestrator.record.decisions import append_decision
from orchestrator.record.lock import only_driver
from orchestrator.record.news import News
from tests.unit.conftest import MakeSweep
from tests.unit.report.terminal import screens

RUNNING = {"a": ("COMPLETE", 0.5), "b": ("RUNNING", 0.7)}
WHY = "stopped by forecast at 4: forecast 0.9 +- 0.1; 3% chance of beating a"

DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.record import Decision, SweepPaths, TrialState, read_sweep, write_record
from orchestrator.record.decisions import append_decision
from orchestrator.record.lock import only_driver

paths = SweepPaths(Path(sys.argv[1]))
with only_driver(paths):
    print("held", flush=True)
    input()
    append_decision(paths, Decision(trial_id="c", step=0, action="chosen", why="near a, the best so far"))
    update = {"stopped": sys.argv[2], "state": TrialState.STOPPED}
    (trial,) = [trial for trial in read_sweep(paths.root).trials() if trial.trial_id == "b"]
    write_record(paths.trial("b").result, trial.model_copy(update=update))
    time.sleep(float(sys.argv[3]))
"""


@contextmanager
def driver(paths: SweepPaths, lasts_s: float) -> Iterator[Callable[[], None]]:
    """Hold a sweep in another process. The function that is yielded has it add to the records, and end later."""
    arguments = [sys.executable, "-c", DRIVER, str(paths.root), WHY, str(lasts_s)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"

        def go_on() -> None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        yield go_on
        process.kill()


def test_decisions_are_told_once_and_earlier_ones_not(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "s", RUNNING)
    append_decision(paths, Decision(trial_id="a", step=0, action="chosen", why="the first"))
    news = News(read_sweep(paths.root))
    assert news.read() == []
    append_decision(paths, Decision(trial_id="b", step=0, action="chosen", why="near a"))
    append_decision(paths, Decision(trial_id="b", step=4, action="stopped", why=WHY))
    assert news.read() == ["b: near a"]
    assert news.read() == []


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_a_terminal_of_80_columns_shows_progress_the_driver_and_decisions_until_the_end(
    tmp_path: Path, make_sweep: MakeSweep, term: str
) -> None:
    paths = make_sweep(tmp_path / "s", RUNNING, num_trials=3)
    progress = paths.trial("b").progress
    write_record(progress, read_record(TrialResult, progress).model_copy(update={"step": 4}))
    with driver(paths, lasts_s=4.0) as go_on:
        waits = [go_on]

        def look(screen: list[str]) -> None:
            if waits and any(" RUNNING " in line for line in screen):
                waits.pop()()

        seen = screens(["-m", "orchestrator", "watch", str(paths.root)], 80, 24, term, look=look)
    assert all(len(line) <= 80 for screen in seen for line in screen)
    every = ["".join("".join(screen).split()) for screen in seen]  # a line may break anywhere

    def was_shown(text: str) -> bool:
        return any("".join(text.split()) in screen for screen in every)

    assert was_shown(f"watching {paths.root}; Ctrl-C ends this view")
    assert was_shown(WHY)
    assert was_shown("c: near a, the best so far")
    if term == "dumb":
        assert was_shown("b RUNNING step 4/?, eval/loss 0.7")
    else:
        assert was_shown("1 of 3 trials ended, 1 running")
        assert was_shown("running on")
    assert "nodriverisrunning" in every[-1]
    assert "".join(f"orchestrator resume {paths.root}".split()) in every[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_leaves_quietly_and_leaves_the_sweep_alone(
    tmp_path: Path, make_sweep: MakeSweep, number: signal.Signals, code: int
) -> None:
    paths = make_sweep(tmp_path / "s", RUNNING, num_trials=3)
    with only_driver(paths):
        call = [sys.executable, "-m", "orchestrator", "watch", str(paths.root)]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().endswith("Ctrl-C ends this view, not the sweep\n")
        time.sleep(0.2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (code, "")
        assert paths.driver.is_file()


def test_a_reader_that_closes_the_pipe_ends_it(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "s", RUNNING, num_trials=3)
    with driver(paths, lasts_s=1.0) as go_on:
        call = f"{sys.executable} -m orchestrator watch {paths.root} | head -n 1"
        process = subprocess.Popen(
            ["bash", "-c", call], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        time.sleep(2)
        go_on()
        printed, errors = process.communicate(timeout=60)
    assert len(printed.splitlines()) == 1
    assert "Traceback" not in errors
