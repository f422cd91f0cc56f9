"""Steer a running sweep: each request takes effect in the sweep and in its records, once, also after a kill."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from drivers import command, start_sweep, wait_until

from orchestrator.errors import RequestError
from orchestrator.record import (
    OPEN,
    SweepRecord,
    TrialResult,
    TrialState,
    is_finished,
    read_decisions,
    read_metrics,
    read_sweep,
    read_trial,
)
from orchestrator.record.ask import ask
from orchestrator.record.requests import read_answer, unanswered, write_request

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

STEPS = 120
LONG = [f"training.steps={STEPS}", "search.num_trials=3", "resources.max_concurrent=2", "search.algorithm=random"]


POINT = {"lora.rank": 8, "lora.dropout": 0.0}
"""A point of the space; the learning rate is fixed here."""


@contextmanager
def running(folder: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """Start a sweep of three trials of which two run at a time; end it at the end of the block."""
    driver = start_sweep(folder, *LONG, *overrides)
    try:
        yield driver
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()


def two_run(trials: list[TrialResult]) -> bool:
    return sum(trial.state == TrialState.RUNNING and trial.best is not None for trial in trials) == 2


def trial(record: SweepRecord, name: str) -> TrialResult:
    return read_trial(record.paths.trial(name), record.info)


def eventually(driver: subprocess.Popen[str], condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    raise AssertionError("it has not come so far within 240 s")


def end(driver: subprocess.Popen[str]) -> str:
    out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, out + err
    return out


def steps_of(record: SweepRecord, name: str) -> list[int]:
    return [p.step for p in read_metrics(record.paths.trial(name)) if "eval/loss" in p.values]


def test_each_verb_changes_a_running_sweep(tmp_path: Path) -> None:
    with running(tmp_path) as driver:
        record = wait_until(tmp_path, driver, two_run)
        first, second = [each.trial_id for each in record.trials()]

        assert ask(record, "pause", trial_id=first) == f"{first} pauses at its next evaluation"
        eventually(driver, lambda: trial(record, first).state == TrialState.PAUSED)
        paused_at = trial(record, first)
        assert paused_at.checkpoint == f"checkpoints/checkpoint-{paused_at.step}"
        eventually(driver, lambda: len(record.trials()) == 3)  # another trial has its slot

        added = ask(record, "add", values=POINT)
        assert "is added" in added
        assert "outside the search space" not in added
        warm = ask(record, "clone", trial_id=first, warm=True, values={"lora.rank": 4, "training.steps": 8})
        assert f"a clone of {first}/adapters/step-" in warm
        assert ask(record, "stop", trial_id=second) == f"{second} stops at its next evaluation"
        with pytest.raises(RequestError, match="is paused already"):
            ask(record, "pause", trial_id=first)
        assert "goes on" in ask(record, "go-on", trial_id=first)
        assert "search.num_trials 3 -> 4" in ask(record, "extend", num_trials=6)
        out = end(driver)

    record = read_sweep(tmp_path / "s")
    assert len(record.trials()) == record.info.num_trials == 6
    new, clone = record.info.added
    stopped = trial(record, second)
    assert stopped.state == TrialState.STOPPED
    assert stopped.stopped.startswith("stopped on request of ")
    assert stopped.stopped == f"stopped on request of {stopped.stopped_by}"
    assert [each.trial_id for each in record.trials() if each.state != TrialState.COMPLETE] == [second]
    assert steps_of(record, first) == list(range(4, STEPS + 1, 4)), "each step once, before and after the pause"
    assert trial(record, new).config.varied == POINT | {"lora.alpha": 16}
    assert trial(record, new).added_by == stopped.stopped_by
    assert trial(record, clone).cloned_from.startswith(f"{first}/adapters/step-")
    assert trial(record, clone).step == 8
    assert trial(record, clone).config.lora.rank == 4
    assert trial(record, first).added_by is None
    actions = [(each.trial_id, each.action) for each in read_decisions(record.paths)]
    for expected in ((first, "paused"), (first, "resumed"), (second, "stopped"), (new, "added"), (clone, "added")):
        assert actions.count(expected) == 1
    assert unanswered(record.paths) == []
    assert f"pause {first}: {first} pauses" in out
    begin = read_metrics(record.paths.trial(clone))[0].values["train/loss"]
    cold = max(read_metrics(record.paths.trial(name))[0].values["train/loss"] for name in (first, new))
    assert begin < cold, "the clone begins with a trained adapter"


def test_a_killed_driver_neither_loses_nor_repeats_a_request_and_two_may_ask_at_once(tmp_path: Path) -> None:
    with running(tmp_path, "search.algorithm=auto", "training.steps=40") as driver:
        record = wait_until(tmp_path, driver, two_run)
        first, second = [each.trial_id for each in record.trials()]
        with ThreadPoolExecutor() as people:
            asked = [
                people.submit(ask, record, "add", values=POINT),
                people.submit(ask, record, "pause", trial_id=first),
                people.submit(ask, record, "add", values=POINT | {"lora.dropout": 0.1, "training.steps": 8}),
            ]
            answers = [each.result() for each in asked]
        assert sum("is added" in answer for answer in answers) == 2
        eventually(driver, lambda: trial(record, first).state == TrialState.PAUSED)
        late = write_request(record.paths, "stop", trial_id=second)
        driver.kill()  # perhaps before the request is taken up, perhaps after it
        driver.wait()
    assert trial(record, first).state == TrialState.PAUSED
    log = tmp_path / "resume.log"
    with log.open("w") as out:
        resume = subprocess.Popen(
            command("resume", str(tmp_path / "s")), stdout=out, stderr=subprocess.STDOUT, text=True
        )
    try:
        eventually(resume, lambda: read_answer(record.paths, late))
        only_paused = f"only 1 paused trial left: {first}; have them go on with: orchestrator go-on"
        eventually(resume, lambda: only_paused in log.read_text())
        assert [each.trial_id for each in record.trials() if each.state in OPEN] == [first]
        assert trial(record, first).state == TrialState.PAUSED, "a resume keeps it paused"
        resume.send_signal(signal.SIGINT)
        assert resume.wait(120) == 130, log.read_text()
        assert "no driver is running; the request is kept" in ask(record, "go-on", trial_id=first)
        again = subprocess.run(command("resume", str(tmp_path / "s")), capture_output=True, text=True, timeout=400)
        assert again.returncode == 0, again.stderr
    finally:
        if resume.poll() is None:
            resume.kill()
            resume.wait()
    record = read_sweep(tmp_path / "s")
    assert len(record.info.added) == 2
    assert len(record.trials()) == record.info.num_trials == 5
    assert trial(record, second).state == TrialState.STOPPED
    assert steps_of(record, first) == list(range(4, 40 + 1, 4))
    actions = [(each.trial_id, each.action) for each in read_decisions(record.paths)]
    for expected in (*((name, "added") for name in record.info.added), (second, "stopped"), (first, "paused")):
        assert actions.count(expected) == 1, expected
    assert is_finished(record)

    longer = subprocess.run(
        command("extend", str(tmp_path / "s"), "--steps", "8"), capture_output=True, text=True, timeout=400
    )
    assert longer.returncode == 0, longer.stderr
    record = read_sweep(tmp_path / "s")
    last = trial(record, record.info.added[-1])
    assert last.state == TrialState.COMPLETE
    assert last.step == 8
    assert "/adapters/step-" in last.cloned_from
