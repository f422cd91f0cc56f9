"""Makespan of a sweep of 32 mixed trials on one GPU and on several of one host, start-up and compile included.

    python -m benchmarks.gpus 1.1b --rows train.jsonl
    python -m benchmarks.gpus 1.1b --rows train.jsonl --gpus 2

The 16 trials of `benchmarks.sweep`, each with two seeds. Beside the whole command's seconds, those from the first point
that any trial logged to the last one: what is left of them without the start.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.common import Setting, main
from benchmarks.sweep import document_of, sweep_ours
from orchestrator.record import read_metrics


def measure(setting: Setting, gpus: list[int], steps: int) -> dict[str, Any]:
    document = document_of(setting, "ours", steps)
    document["search"]["space"]["training.seed"] = {"grid": [1, 2]}
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for count in gpus:
            figures[str(count)] = _on(count, document, Path(scratch))
            print(count, figures[str(count)], flush=True)
    first = figures[str(gpus[0])]
    return {"figures": figures} | {
        f"{count}_over_{gpus[0]}_{name}": round(first[name] / figures[str(count)][name], 2)
        for count in gpus[1:]
        for name in ("makespan_s", "training_s")
    }


def _on(count: int, document: dict[str, Any], folder: Path) -> dict[str, float]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    devices = visible.split(",")[:count]
    assert len(devices) == count, f"{count} GPUs asked for, and CUDA_VISIBLE_DEVICES is {visible}"
    swept = sweep_ours(document, folder, f"on-{count}", CUDA_VISIBLE_DEVICES=",".join(devices))
    trials = swept.trials()
    paths = [swept.record.paths.trial(trial.trial_id) for trial in trials]
    times = [at for each in paths for at in _times(each.tensorboard)]
    training_s = max(times) - min(times)
    tokens = sum(trial.tokens for trial in trials) - sum(read_metrics(each)[0].tokens for each in paths)
    return {
        "makespan_s": round(swept.seconds, 1),
        "training_s": round(training_s, 1),
        "tokens_per_second": round(tokens / training_s),
        "workers": len({trial.worker for trial in trials}),
    }


def _times(folder: Path) -> list[float]:
    """When (time.time) a trial's losses were written to TensorBoard."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [scalar.wall_time for scalar in accumulator.Scalars("train/loss")]


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        measure,
        gpus={"nargs": "+", "type": int, "default": [1, 2], "help": "how many of the host's GPUs, each in turn"},
        steps={"type": int, "default": 200, "help": "of a trial; fewer for a try"},
    )
