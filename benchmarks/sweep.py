"""Makespan of a sweep of 16 mixed trials, start-up and compile included, against one process a trial under Ray Tune.

    python -m benchmarks.sweep 1.1b --rows train.jsonl

Ranks 8 to 64, dropout 0 and 0.1, rates 5e-5 to 5e-4, 200 steps, batch 4, 4 evaluations of 100 rows. Ours is the whole
command `orchestrator sweep`. Of each baseline two trials are run whole, and the time of one is multiplied by 16.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import BASELINES, ROOT, Setting, main
from benchmarks.pack import points, spec_of
from orchestrator.record import TrialState, read_sweep

TRAINING = {"steps": 200, "eval_steps": 50}
NUM_TRIALS, NUM_MEASURED = 16, 2
COMMAND = [sys.executable, "-c", "from orchestrator.cli import main; main()"]


def measure(setting: Setting) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, scheduler in {"ours": "none", "ours_asha": "asha"}.items():
            spec = spec_of(setting, **TRAINING).model_dump(mode="json") | {"scheduler": {"kind": scheduler}}
            figures[name] = _ours(spec, folder, name)
            print(name, figures[name], flush=True)
        for name in ("B", "A"):
            spec = spec_of(setting, **TRAINING, **BASELINES[name]).model_dump(mode="json")
            figures[name] = _one_process(spec, folder, name)
            print(name, figures[name], flush=True)
    makespan = {name: each["makespan_s"] for name, each in figures.items()}
    return {
        **makespan,
        "A_over_ours": round(makespan["A"] / makespan["ours"], 1),
        "B_over_ours": round(makespan["B"] / makespan["ours"], 1),
        "figures": figures,
    }


def _ours(spec: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(spec))
    seconds = _timed([*COMMAND, "sweep", str(file), "--name", name, "--output", str(folder)])
    trials = read_sweep(folder / name).trials()
    assert len(trials) == NUM_TRIALS
    assert all(trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in trials), trials
    return {
        "makespan_s": round(seconds, 1),
        "tokens": sum(trial.tokens for trial in trials),
        "stopped": sum(trial.state == TrialState.STOPPED for trial in trials),
        "winner": trials[0].trial_id,
        "losses": [trial.best.value for trial in trials if trial.best],
        "peak_gib": max(trial.peak_memory_gib or 0 for trial in trials),
    }


def _one_process(spec: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    spec_file, points_file = folder / f"{name}.json", folder / f"{name}-points.json"
    spec_file.write_text(json.dumps(spec))
    points_file.write_text(json.dumps(points()[:NUM_MEASURED]))
    seconds = _timed(
        [sys.executable, "-m", "benchmarks.one_process", str(spec_file), str(folder / name), str(points_file)]
    )
    return {"makespan_s": round(seconds / NUM_MEASURED * NUM_TRIALS, 1), "a_trial_s": round(seconds / NUM_MEASURED, 1)}


def _timed(command: list[str]) -> float:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    print(done.stdout[-1500:], flush=True)
    return time.monotonic() - start


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
