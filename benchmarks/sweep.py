"""Makespan of a sweep of 16 mixed trials, with start-up and compilation, against one process a trial in Ray Tune.

    python -m benchmarks.sweep 1.1b --rows train.jsonl
    python -m benchmarks.sweep 1.1b --rows train.jsonl --forms A --earlier benchmarks/out/sweep-1.1b.json

Ranks are 8 to 64, dropout 0 and 0.1, learning rates 5e-5 and 5e-4, 200 steps, batch 4, 4 evaluations of 100 rows.
"ours" is the whole command `orchestrator sweep` with a cold kernel cache. Of each baseline, two trials are run in full
and their time is multiplied by 8; what precedes them (imports, Ray, tokenization) is counted once.

Under ASHA (rungs at 50 and 150) the time of a sweep is the time until the end, when the winner is known. A baseline's
time under ASHA is computed, not measured: its trials run one after another, and each stops where the project's
scheduler stops it, given the losses of `ours`. A trial takes as long as the fully run trials took to that evaluation.
The result is the mean of 100 random orders.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from benchmarks.common import BASELINES, ROOT, Setting, environment, main
from benchmarks.pack import points, spec_of
from orchestrator.record import MetricPoint, SweepRecord, TrialResult, TrialState, read_metrics, read_sweep
from orchestrator.spec.load import parse_spec
from orchestrator.sweep.schedulers.factory import make_scheduler

FORMS = ("ours", "ours_asha", "B", "A")
NUM_MEASURED, NUM_ORDERS = 2, 100
OURS = "from orchestrator.cli import main; main()"


def measure(setting: Setting, forms: list[str], earlier: list[Path], steps: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    here = environment()
    for file in earlier:
        figures |= json.loads(file.read_text())["figures"]
    for form, each in figures.items():
        if (each["steps"], each["device"]) != (steps, here["device"]):
            found = f"{form} has {each['steps']} steps on {each['device']}"
            raise SystemExit(f"--earlier: {found}; give runs of {steps} steps on this device")
    with tempfile.TemporaryDirectory() as scratch:
        for form in forms:
            run = _baseline if form in BASELINES else _ours
            found = run(document_of(setting, form, steps), Path(scratch), form)
            figures[form] = {"steps": steps, "device": here["device"], "commit": here["commit"], **found}
            print(form, json.dumps(figures[form]), flush=True)
    return summary(figures, document_of(setting, "ours_asha", steps)) | {"figures": figures}


def document_of(setting: Setting, form: str, steps: int) -> dict[str, Any]:
    """Return the experiment in one of the forms."""
    spec = spec_of(setting, steps=steps, eval_steps=steps // 4, **BASELINES.get(form, {}))
    document: dict[str, Any] = spec.model_dump(mode="json")
    document["scheduler"] = {"kind": "asha" if form == "ours_asha" else "none"}
    if form in BASELINES:
        document["resources"]["max_concurrent"] = 1
    return document


def summary(figures: dict[str, Any], asha: dict[str, Any]) -> dict[str, Any]:
    """Makespans and their ratios, as far as their parts are there; `asha` is the experiment under ASHA."""
    seconds = {form: each["makespan_s"] for form, each in figures.items()}
    if "ours" in figures:
        losses = figures["ours"]["evaluations"]
        orders = [random.Random(seed).sample(losses, len(losses)) for seed in range(NUM_ORDERS)]
        for form in (form for form in BASELINES if form in figures):
            each = [time_under_asha(asha, order, **figures[form]["parts"]) for order in orders]
            seconds[f"{form}_asha_composed"] = round(mean(each), 1)
    wanted = {"ours": ("A", "B"), "ours_asha": ("A_asha_composed", "B_asha_composed", "A", "B")}
    ratios = {
        f"{form}_over_{ours}": round(seconds[form] / seconds[ours], 1)
        for ours, forms in wanted.items()
        for form in forms
        if ours in seconds and form in seconds
    }
    return seconds | ratios


def time_under_asha(
    asha: dict[str, Any], losses: list[dict[str, float]], before_s: float, to_evaluation_s: dict[str, float]
) -> float:
    """Return the seconds of trials that run one after another, each stopped where ASHA stops it by its losses."""
    scheduler = make_scheduler(parse_spec(asha), num_rows=1)  # the experiment gives its steps
    scheduler.set_search_properties("eval/loss", "min")
    seconds = before_s
    for index, of_trial in enumerate(losses):
        trial = SimpleNamespace(trial_id=str(index), config={}, is_finished=lambda: False)
        scheduler.on_trial_add(None, trial)
        for step, loss in of_trial.items():
            last = step
            report = {"step": int(step), "eval/loss": loss}
            if scheduler.on_trial_result(None, trial, report) == TrialScheduler.STOP:
                break
        seconds += to_evaluation_s[last]
    return seconds


@dataclass(frozen=True)
class Swept:
    """A sweep that a command has run."""

    seconds: float
    """Time of the whole command."""
    record: SweepRecord
    output: str
    """What the command printed."""

    def trials(self) -> list[TrialResult]:
        """Return the trials in the order in which they began."""
        return sorted(self.record.trials(), key=lambda trial: trial.trial_id)

    def evaluations(self) -> list[list[MetricPoint]]:
        """Return the evaluations of each trial, in that order."""
        paths = [self.record.paths.trial(trial.trial_id) for trial in self.trials()]
        return [[point for point in read_metrics(each) if "eval/loss" in point.values] for each in paths]


def sweep_ours(document: dict[str, Any], folder: Path, name: str, **variables: str) -> Swept:
    """Run `orchestrator sweep` from its start to its end, with no kernel compiled before."""
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(document))
    command = ["-c", OURS, "sweep", str(file), "--name", name, "--output", str(folder)]
    swept = _swept(command, folder / name, TRITON_CACHE_DIR=str(folder / f"{name}-kernels"), **variables)
    assert all(trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in swept.trials()), swept.trials()
    return swept


def sweep_one_process(document: dict[str, Any], points: list[dict[str, Any]], folder: Path, name: str) -> Swept:
    """Run trials in a process each, from the start of the driver to its end."""
    spec_file, points_file = folder / f"{name}.json", folder / f"{name}-points.json"
    spec_file.write_text(json.dumps(document))
    points_file.write_text(json.dumps(points))
    return _swept(["-m", "benchmarks.one_process", str(spec_file), str(folder / name), str(points_file)], folder / name)


def _ours(document: dict[str, Any], folder: Path, form: str) -> dict[str, Any]:
    swept = sweep_ours(document, folder, form)
    trials, winner = swept.trials(), swept.record.trials()[0]
    return {
        "makespan_s": round(swept.seconds, 1),
        "tokens": sum(trial.tokens for trial in trials),
        "stopped": sum(trial.state == TrialState.STOPPED for trial in trials),
        "winner": winner.config.varied,
        "peak_gib": max(trial.peak_memory_gib or 0 for trial in trials),
        "evaluations": [
            {str(point.step): point.values["eval/loss"] for point in of_trial} for of_trial in swept.evaluations()
        ],
    }


def _baseline(document: dict[str, Any], folder: Path, form: str) -> dict[str, Any]:
    swept = sweep_one_process(document, points()[:NUM_MEASURED], folder, form)
    trials_s = float(swept.output.split("TRIALS_S", 1)[1].split()[0])
    before_s, a_trial_s = swept.seconds - trials_s, trials_s / NUM_MEASURED
    after_s = [  # for each trial, from each of its evaluations to the last
        {str(point.step): of_trial[-1].time_s - point.time_s for point in of_trial} for of_trial in swept.evaluations()
    ]
    to_evaluation_s = {step: a_trial_s - mean(each[step] for each in after_s) for step in after_s[0]}
    return {
        "makespan_s": round(before_s + a_trial_s * len(points()), 1),
        "parts": {"before_s": before_s, "to_evaluation_s": to_evaluation_s},
    }


def _swept(arguments: list[str], folder: Path, **variables: str) -> Swept:
    inherited = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    start = time.monotonic()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=inherited | variables, capture_output=True, text=True, cwd=ROOT)
    seconds = time.monotonic() - start
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return Swept(seconds, read_sweep(folder), done.stdout)


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        measure,
        forms={"nargs": "+", "choices": FORMS, "default": FORMS, "help": "forms to run now"},
        earlier={
            "nargs": "+",
            "type": Path,
            "default": [],
            "help": "JSON files of earlier runs, whose forms are reused",
        },
        steps={"type": int, "default": 200, "help": "steps of a trial; fewer for a quick try"},
    )
