"""The cost of the driver as sweeps grow: real Ray Tune, real records, and workers that pretend to train.

    python -m benchmarks.size --trials 10 100 1000 --evaluations 100 --workers 4 --slots 4

The workers send the events of a trial as real ones do, but compute nothing; everything else is the product. For each
number of trials: CPU time of the driver for each report, its memory in each tenth of the sweep, the time of
`orchestrator status`, and the files that a trial leaves. The figures of each go to benchmarks/out/size-TRIALS.json.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

from benchmarks.common import ROOT, write
from orchestrator.record import SweepPaths, TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.sweep import run
from orchestrator.sweep.workers import fleet
from orchestrator.training.attempt.events import Completed, Evaluated, Event, Left, Logged, Noted

OUT = Path(__file__).parent / "out"
STEPS_PER_EVALUATION = 10
EVENTS_PER_CALL = 8
"""Events that a worker hands out at a time: real ones come one evaluation at a time."""


class SimulatedWorker:
    """Answers as `sweep.workers.worker.Worker` does. Each trial's losses fall towards a value drawn from its name."""

    def __init__(self, spec: SweepSpec, slots: int, is_fixed: bool, gpus: float) -> None:
        self._spec, self._slots = spec, slots
        self._events: dict[str, list[Event]] = {}
        self._interrupted = False

    def open(self, data: list[Any], logs: str) -> tuple[int, str]:
        """Return the number of slots; the rows are not fetched."""
        return self._slots, ""

    def interrupt(self, wait_s: float) -> None:
        """Let no other trial start."""
        self._interrupted = True

    def is_interrupted(self) -> bool:
        """Return whether `interrupt` has been called."""
        return self._interrupted

    def free_slots(self) -> int | None:
        """Return the number of free slots."""
        return self._slots - len(self._events)

    def start(self, lease: str, start: TrialResult, paths: TrialPaths) -> bool:
        """Prepare the events of a trial."""
        if len(self._events) >= self._slots:
            return False
        self._events[lease] = simulated_events(start)
        return True

    def events(self, lease: str, wait_s: float) -> list[Event] | None:
        """Return the next events of a trial."""
        left = self._events.get(lease)
        if left is None:
            return None
        taken, left[:] = left[:EVENTS_PER_CALL], left[EVENTS_PER_CALL:]
        if not left:
            del self._events[lease]
        return taken

    def renew(self, lease: str) -> None:
        """Do nothing: leases do not expire here."""

    def release(self, lease: str) -> None:
        """End a trial at once."""
        if lease in self._events:
            self._events[lease] = [Left(0.0, 0.0, 0.0, 0, None)]


def simulated_events(start: TrialResult) -> list[Event]:
    """Return the events of a whole trial."""
    training, draw = start.config.training, random.Random(start.trial_id)
    assert training.steps is not None
    end, scale = draw.uniform(0.5, 0.9), draw.uniform(0.5, 2.0)
    applied = {"engine": "fast", "device": "cpu", "total_steps": training.steps, "applied": {"lora.rank": 8}}
    events: list[Event] = [Noted(0.0, 0.0, 0.0, applied)]
    best = float("inf")
    for step in range(STEPS_PER_EVALUATION, training.steps + 1, STEPS_PER_EVALUATION):
        used, loss = (0.1 * step, 0.0, 1.0), end + scale * (1 - step / training.steps) ** 2 + draw.gauss(0, 0.003)
        values = {"train/loss": loss, "train/grad_norm": 0.5, "train/learning_rate": training.learning_rate}
        events.append(Logged(*used, step, 100 * step, 0.1 * step, values))
        adapter = f"adapters/step-{step}" if loss < best else None
        best = min(best, loss)
        events.append(Evaluated(*used, step, 100 * step, {"eval/loss": loss}, adapter, saves=False))
    return [*events, Completed(0.1 * training.steps, 0.0, 1.0)]


def memory_mib() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


class Meter:
    """A `Watch` that notes the driver's memory and CPU time as trials end."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials = num_trials
        self.memory: list[float] = []
        """Memory in MiB once a tenth, two tenths, ... of the trials have ended."""
        self.cpu: list[float] = []
        """CPU seconds of the driver at the same moments."""

    def __call__(self, trials: list[TrialResult]) -> None:
        ended = sum(trial.state not in ("RUNNING", "PAUSED") for trial in trials)
        while len(self.memory) < 10 * ended // self._num_trials:
            self.memory.append(round(memory_mib(), 1))
            self.cpu.append(round(time.process_time(), 2))


def document_of(asked: argparse.Namespace, num_trials: int) -> dict[str, Any]:
    """Return the experiment."""
    document: dict[str, Any] = load_spec(ROOT / "experiments" / "demo.yaml").model_dump(mode="json", exclude_unset=True)
    document["training"] |= {"steps": asked.evaluations * STEPS_PER_EVALUATION, "eval_steps": STEPS_PER_EVALUATION}
    document["search"] |= {"algorithm": asked.algorithm, "num_trials": num_trials}
    document["search"]["space"]["lora.dropout"] = {"uniform": [0.0, 0.2]}
    document["scheduler"] = {"kind": asked.scheduler}
    document["evaluation"] = {"metrics": []}
    document["data"] |= {"max_rows": 400}
    document["resources"] = {"trials_per_gpu": asked.slots, "max_concurrent": asked.workers * asked.slots}
    document["tracking"] = {"tensorboard": False, "wandb": {"mode": "disabled"}}
    return document


def measure(asked: argparse.Namespace, num_trials: int, folder: Path) -> dict[str, Any]:
    """Run one sweep and return its figures."""
    spec = parse_spec(document_of(asked, num_trials))
    paths, meter = SweepPaths(folder / f"size-{num_trials}"), Meter(num_trials)
    began, cpu = time.monotonic(), time.process_time()
    record = run.run_sweep(spec, paths, meter, say=print)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    trials = record.trials()
    reports = sum(trial.step // STEPS_PER_EVALUATION for trial in trials)
    files = [path for path in paths.root.rglob("*") if path.is_file()]
    in_trials = [path for path in files if paths.root / "trials" in path.parents]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "orchestrator", "status", str(paths.root)], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "trials": num_trials,
        "reports": reports,
        "makespan_s": round(seconds, 1),
        "driver_cpu_s": round(cpu, 1),
        "driver_cpu_ms_a_report_by_tenth": [
            round(1000 * (later - earlier) / (reports / 10), 2) for earlier, later in pairwise(meter.cpu)
        ],
        "memory_mib_by_tenth": meter.memory,
        "status_cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "files_a_trial": round(len(in_trials) / num_trials, 1),
        "files_in_all": len(files),
        "mib_on_disk": round(sum(path.stat().st_size for path in files) / 2**20, 1),
        "scheduler": asked.scheduler,
        "slots": asked.workers * asked.slots,
    }


def main() -> None:
    """Measure each number of trials in a process of its own, so that memory begins anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4, help="trials at a time in each worker")
    parser.add_argument("--scheduler", default="none")
    parser.add_argument("--algorithm", default="random")
    asked = parser.parse_args()
    if len(asked.trials) > 1:
        for num_trials in asked.trials:
            rest = [f"--{name}={getattr(asked, name)}" for name in vars(asked) if name != "trials"]
            subprocess.run([sys.executable, "-m", "benchmarks.size", "--trials", str(num_trials), *rest], check=True)
        return
    fleet.Worker = SimulatedWorker  # type: ignore[misc,assignment]
    ray.init(address="local", num_cpus=asked.workers + 1, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(asked, asked.trials[0], Path(folder))
    print(json.dumps(figures), flush=True)
    write(OUT / f"size-{asked.trials[0]}.json", figures)


if __name__ == "__main__":
    main()
