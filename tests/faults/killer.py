"""Sweeps in processes of their own, whose parts are killed at random moments until the sweep is done."""

import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from outcome import FaultOutcome, append_outcome
from tiny import DEMO, TINY

from orchestrator.adapters.bundle import verify
from orchestrator.errors import OrchestratorError
from orchestrator.record import MetricPoint, SweepRecord, TrialState, read_metrics, read_sweep

STEPS = 32
INTERVAL = 4
"""Steps between two checkpoints, and between two evaluations."""
RATES = [1e-3, 2e-3, 4e-3]
SETTINGS = [
    *(setting for setting in TINY if not setting.startswith("scheduler")),
    "scheduler.kind=none",
    "search={algorithm: grid}",
    f"search.space={{training.learning_rate: {{grid: {RATES}}}}}",
    f"training.steps={STEPS}",
    f"training.eval_steps={INTERVAL}",
    f"training.save_steps={INTERVAL}",
    "training.logging_steps=1",
    "resources.gpus_per_trial=0",
    "resources.max_restarts=20",
]
LIMIT_S = 900.0

Values = tuple[int, tuple[tuple[str, float], ...]]
"""Step and metrics of a point; times differ from run to run."""


def values_of(point: MetricPoint) -> Values:
    """Return what must be the same in each run."""
    return point.step, tuple(sorted(point.values.items()))


def curves(record: SweepRecord) -> dict[float, list[Values]]:
    """Return the points of each trial, by its learning rate."""
    return {
        trial.config.training.learning_rate: [values_of(p) for p in read_metrics(record.paths.trial(trial.trial_id))]
        for trial in record.trials()
        if trial.state != TrialState.CANCELLED
    }


class RunningSweep:
    """A sweep whose driver is a process of its own."""

    def __init__(self, folder: Path, *settings: str, address: str | None = None, name: str = "s") -> None:
        self.root = folder / name
        self._options = ["--address", address] if address else []
        self._log = (folder / f"{name}.log").open("ab")
        options = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        self._start("sweep", str(DEMO), "--output", str(folder), "--name", name, *options)

    def resume(self) -> None:
        """Start another driver."""
        self._start("resume", str(self.root))

    def _start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "orchestrator.cli", *arguments, *self._options]
        self.driver = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    @property
    def record(self) -> SweepRecord | None:
        """The sweep's record, once it has begun."""
        return read_sweep(self.root) if (self.root / "sweep.json").is_file() else None

    def num_points(self) -> int:
        """Return the number of points on disk."""
        return sum(len(file.read_bytes().splitlines()) for file in self.root.glob("trials/*/metrics.jsonl"))

    def processes(self, *names: str) -> list[psutil.Process]:
        """Return the driver's processes whose commands begin with one of these names."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.driver.pid).children(recursive=True)
            return [child for child in children if _command(child).startswith(names)]
        return []

    def wait_for_points(self, more: int, deadline: float) -> bool:
        """Wait for so many new points; return whether they came before the driver ended."""
        wanted = self.num_points() + more
        while self.num_points() < wanted:
            if self.driver.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.05)
        return True

    def finish(self, deadline: float) -> int:
        """Wait for the driver's end, and return its exit code."""
        with suppress(subprocess.TimeoutExpired):
            return self.driver.wait(max(deadline - time.monotonic(), 1))
        self.driver.kill()
        raise AssertionError(self.tail())

    def tail(self) -> str:
        """Return the end of the drivers' output."""
        return self.output()[-4000:]

    def output(self) -> str:
        """Return the drivers' output."""
        return (self.root.parent / f"{self.root.name}.log").read_text(errors="replace")


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@dataclass
class Ledger:
    """What was on disk before each kill, to be compared with the end."""

    seen: set[tuple[float, Values]] = field(default_factory=set)
    finished: dict[Path, int] = field(default_factory=dict)
    """Result of each finished trial, and the time of its last change."""
    steps_lost: int = 0
    most_lost: int = 0
    """Most steps that one trial has lost by one kill."""
    kills: int = 0

    def note(self, sweep: RunningSweep, victim: str | None = None) -> None:
        """Note a kill, and what was on disk. With a victim, only steps of trials of that worker are lost."""
        self.kills += 1
        if (record := sweep.record) is None:
            return
        for trial in record.trials():
            paths = record.paths.trial(trial.trial_id)
            points = read_metrics(paths)
            rate = trial.config.training.learning_rate
            self.seen |= {(rate, values_of(point)) for point in points}
            if paths.result.is_file():
                self.finished.setdefault(paths.result, paths.result.stat().st_mtime_ns)
            elif points and (victim is None or trial.worker == victim):
                kept = int(trial.checkpoint.rpartition("-")[2]) if trial.checkpoint else 0
                lost = points[-1].step - kept
                self.steps_lost += max(lost, 0)
                self.most_lost = max(self.most_lost, lost)

    def metrics_lost(self, record: SweepRecord) -> int:
        """Return the points that are missing at the end, or have other values, or are there twice."""
        at_end = [(rate, values) for rate, points in curves(record).items() for values in points]
        places = {(rate, step, tuple(name for name, _ in metrics)) for rate, (step, metrics) in at_end}
        return len(self.seen - set(at_end)) + len(at_end) - len(places)


def adapters_lost(record: SweepRecord) -> int:
    """Return the number of COMPLETE trials whose adapter does not pass `verify`."""
    lost = 0
    for trial in record.trials():
        if trial.state == TrialState.COMPLETE:
            try:
                verify(record.adapter(trial))
            except OrchestratorError:
                lost += 1
    return lost


def pause(rng: random.Random, sweep: RunningSweep, deadline: float) -> None:
    """Let a random time pass: often while trials train, sometimes while a driver or a worker starts."""
    if rng.random() < 0.75:
        sweep.wait_for_points(rng.randint(1, 16), deadline)
        time.sleep(rng.uniform(0, 0.5))
    else:
        time.sleep(rng.uniform(0.5, 10))


def kill(process: psutil.Process) -> None:
    """Kill a process that may just have ended."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def check(fault: str, sweep: RunningSweep, ledger: Ledger, whole: dict[float, list[Values]], losses: int) -> None:
    """Compare a sweep that is done with an undisturbed one, and add its outcome to the table.

    Args:
        fault: name of the fault.
        sweep: the sweep.
        ledger: what was on disk before each kill.
        whole: curves of an undisturbed sweep.
        losses: checkpoint intervals that one kill may cost a trial.
    """
    record = sweep.record
    assert record is not None
    states = [trial.state for trial in record.trials() if trial.state != TrialState.CANCELLED]
    is_whole = states == [TrialState.COMPLETE] * len(RATES)
    metrics, adapters = ledger.metrics_lost(record), adapters_lost(record)
    survived = ledger.kills if is_whole else 0
    append_outcome(FaultOutcome(fault, ledger.kills, survived, metrics, adapters, ledger.steps_lost))
    assert is_whole, (record.trials(), sweep.tail())
    assert (metrics, adapters) == (0, 0)
    assert curves(record) == whole
    for result, changed in ledger.finished.items():
        assert result.stat().st_mtime_ns == changed, f"{result}: a finished trial ran again"
    assert ledger.most_lost <= losses * INTERVAL
