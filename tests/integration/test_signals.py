"""Real signals to real processes: the last steps are kept, and message and exit code name the signal."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import pytest
from drivers import command
from tiny import DEMO, TINY, Witness

from orchestrator.record import SweepPaths, SweepRecord, TrialResult, TrialState, read_metrics, read_sweep
from orchestrator.signals import Signalled
from orchestrator.spec import SweepSpec
from orchestrator.training.local import resume_local_trial, run_local_trial

pytestmark = pytest.mark.slow

STEPS = 60

# No checkpoint is written before the evaluation at the end, unless a signal arrives.
SETTINGS = [
    *(setting for setting in TINY if not setting.startswith(("scheduler.", "training.save_steps"))),
    "scheduler.kind=none",
    f"training.steps={STEPS}",
    f"training.eval_steps={STEPS}",
    "search.algorithm=optuna",
    "search.num_trials=3",
    "resources.max_concurrent=2",
]
OPTIONS = [part for setting in SETTINGS for part in ("--set", setting)]


def start(verb: str, folder: Path, *overrides: str, **options: object) -> subprocess.Popen[str]:
    more = [part for setting in overrides for part in ("--set", setting)]
    arguments = [verb, str(DEMO), "--output", str(folder), "--name", "s", *OPTIONS, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*arguments), **{**pipes, **options})  # type: ignore[call-overload, no-any-return]


def wait_for_steps(folder: Path, process: subprocess.Popen[str], number: int = 4) -> SweepRecord:
    """Wait until every running trial has made some steps."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (folder / "s" / "sweep.json").is_file():
            record = read_sweep(folder / "s")
            begun = record.paths.trial_ids()
            num_steps = [len(read_metrics(record.paths.trial(trial_id))) for trial_id in begun]
            if begun and all(2 * steps >= number for steps in num_steps):
                return record
        time.sleep(0.05)
    raise AssertionError("no trial made a step within 180 s")


def assert_kept(record: SweepRecord) -> list[TrialResult]:
    """Check that each started trial has a checkpoint of its last step, and that no partial file is left."""
    begun = [trial for trial in record.trials() if trial.step]
    assert begun
    for trial in begun:
        assert (trial.state, trial.error) == (TrialState.RUNNING, None)
        assert trial.checkpoint == f"checkpoints/checkpoint-{trial.step}", "steps are lost"
        points = read_metrics(record.paths.trial(trial.trial_id))
        assert points[-1].step == trial.step
        assert points[-1].tokens == trial.tokens
    hidden = {path.name for path in record.paths.root.rglob(".*")}
    # `.first-step` starts the clock of a budget in hours; the next driver removes it.
    assert hidden <= {".driver.lock", ".first-step", ".validate_storage_marker"}, hidden
    return begun


def assert_goes_on(record: SweepRecord, begun: list[TrialResult], number: int) -> None:
    done = subprocess.run(command("resume", str(record.paths.root)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = {trial.trial_id: trial for trial in record.trials()}
    assert [trial.state for trial in after.values()] == [TrialState.COMPLETE] * number
    for trial in begun:
        points = read_metrics(record.paths.trial(trial.trial_id))
        steps = [point.step for point in points if "train/loss" in point.values]
        assert trial.step in steps, "began before the checkpoint"
        assert steps == sorted(set(steps)), "a step is recorded twice"
        assert after[trial.trial_id].step == STEPS


class SignalAt(Witness):
    """A witness that sends this process a signal after a step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def on_step(self, step: int, total_steps: int) -> bool:
        if step == self._at:
            signal.raise_signal(Signals.SIGTERM)
        return True


@pytest.mark.parametrize("engine", ["fast", "trl"])
def test_a_trial_resumes_from_the_step_of_the_signal_with_identical_values(
    tiny: Callable[..., SweepSpec], tmp_path: Path, engine: str
) -> None:
    """The signal arrives between evaluations, where no checkpoint would be written otherwise."""
    spec = tiny(f"training.engine={engine}", "training.save_steps=12", "training.logging_steps=1", "lora.dropout=0.1")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    undisturbed = run_local_trial(spec, whole, Witness())
    assert undisturbed is not None
    with pytest.raises(Signalled):
        run_local_trial(spec, broken, SignalAt(6))
    record = read_sweep(broken.root)
    (interrupted,) = record.trials()
    assert (interrupted.state, interrupted.step) == (TrialState.RUNNING, 6)
    assert interrupted.checkpoint == "checkpoints/checkpoint-6"
    resumed = resume_local_trial(record, Witness())
    assert resumed is not None
    assert (resumed.best, resumed.tokens) == (undisturbed.best, undisturbed.tokens)
    curves = [
        [(point.step, point.tokens, point.values) for point in read_metrics(paths.trial(trial.trial_id))]
        for paths, trial in ((whole, undisturbed), (broken, resumed))
    ]
    assert curves[0] == curves[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "number", [Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP, Signals.SIGUSR1], ids=lambda each: each.name
)
def test_a_trial_keeps_its_last_step(tmp_path: Path, number: Signals) -> None:
    with start("trial", tmp_path) as process:
        record = wait_for_steps(tmp_path, process)
        process.send_signal(number)
        said, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number, message
    name = "Ctrl-C" if number == Signals.SIGINT else number.name
    assert f"{name}: stopping at the next step, " in said
    assert message.startswith(f"error: interrupted by {name}")
    assert f"orchestrator resume {tmp_path / 's'}" in message
    begun = assert_kept(record)
    assert_goes_on(record, begun, number=1)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [Signals.SIGINT, Signals.SIGTERM, Signals.SIGUSR1], ids=lambda each: each.name)
def test_a_sweep_keeps_the_last_step_of_every_trial(tmp_path: Path, number: Signals) -> None:
    """All processes of the sweep get the signal, as from `timeout`, systemd, Slurm or Ctrl-C in a terminal."""
    with start("sweep", tmp_path, start_new_session=True) as process:
        record = wait_for_steps(tmp_path, process)
        os.killpg(process.pid, number)
        _, message = process.communicate(timeout=120)
    assert process.returncode == 128 + number, message
    name = "Ctrl-C" if number == Signals.SIGINT else number.name
    assert f"error: interrupted by {name} with 0 of 3 trials ended" in message
    assert f"orchestrator resume {tmp_path / 's'}" in message
    assert "Traceback" not in message
    begun = assert_kept(record)
    assert_goes_on(record, begun, number=3)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("verb", "num_trials"), [("trial", 1), ("sweep", 3)])
def test_a_closed_terminal_interrupts_its_processes(tmp_path: Path, verb: str, num_trials: int) -> None:
    """The kernel sends SIGHUP to all processes of a closed terminal, and nothing can be written to it any more."""
    ours, theirs = pty.openpty()
    # A process that leads a session with this terminal.
    script = (
        "import fcntl, os, sys, termios\n"
        "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    arguments = command(verb, str(DEMO), "--output", str(tmp_path), "--name", "s", *OPTIONS)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, text=True
    )
    # Plays the terminal: it reads what is written, for a full buffer would block the writer. Killing it closes `ours`.
    terminal = subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL)
    os.close(ours)
    os.close(theirs)
    try:
        record = wait_for_steps(tmp_path, process)
    finally:
        terminal.kill()
        terminal.wait()
    assert process.wait(timeout=120) == 128 + Signals.SIGHUP
    begun = assert_kept(record)
    assert_goes_on(record, begun, number=num_trials)


def test_a_signal_before_the_first_step_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    with start("trial", tmp_path) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "s").is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 143, message
    assert "interrupted by SIGTERM" in message
    assert "Traceback" not in message
    if not (tmp_path / "s" / "sweep.json").is_file():
        assert list(tmp_path.iterdir()) == []
