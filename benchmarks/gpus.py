"""Makespan of a sweep of 32 mixed trials on one GPU and on several GPUs of a host, with start-up and compilation.

    python -m benchmarks.gpus 1.1b --rows train.jsonl
    python -m benchmarks.gpus 1.1b --rows train.jsonl --gpus 2

The trials are the 16 of `benchmarks.sweep`, each with two seeds. `makespan_s` is the time of the whole command;
`training_s` is the time from the first point that any trial logged to the last one, and so excludes the start.
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
    assert len(devices) == count, f"--gpus {count}: CUDA_VISIBLE_DEVICES has fewer ({visible}); list {count}"
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
    """Return the times (time.time) at which a trial's losses were written to TensorBoard."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [scalar.wall_time for scalar in accumulator.Scalars("train/loss")]


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        measure,
        gpus={"nargs": "+", "type": int, "default": [1, 2], "help": "numbers of GPUs to measure, one after another"},
        steps={"type": int, "default": 200, "help": "steps of a trial; fewer for a quick try"},
    )
