"""Seconds to set a trial up, by part; and in a sweep, from Tune's start of a trial on a warm worker to its first step.

    python -m benchmarks.setup 1.1b --rows train.jsonl
    python -m benchmarks.setup thin --rows train.jsonl

`thin` is for a CPU: it has as many layers as 1.1b, but narrow ones. The set-up of the first trial, in which PEFT adapts
the base once, is reported apart (`first_s`); the other numbers are medians of the later trials. In a sweep, the time of
the first step is that of the trial's first point on disk. It includes the wait for the step that other trials are in.
"""

import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Setting, forget, main
from orchestrator.data import prepare
from orchestrator.record import SweepPaths
from orchestrator.sweep import results, run
from orchestrator.sweep.results import ResultKeeper
from orchestrator.training.engines.sft import build_trainer
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.joint import engine_for
from orchestrator.training.fast.drive.slot import Slot
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.model.device import use_device
from orchestrator.training.model.peft_model import model_from_template
from orchestrator.training.write_queue import WriteNow

TRIALS, SLOTS = 8, 2
PARTS = ("model", "trainer", "begin")
"""The base with an adapter; the SFTTrainer; loader, optimizer, schedule and the copy of the adapter into its slot."""


def measure(setting: Setting, rank: int) -> dict[str, Any]:
    figures = parts(setting, rank)
    forget()
    return figures | {"start_to_first_step_s": in_a_sweep(setting, rank)}


def parts(setting: Setting, rank: int) -> dict[str, Any]:
    """Measure the parts of one set-up after another in this process."""
    use_device(1)
    config = setting.spec({"steps": 100, "eval_steps": 50}, lora={"rank": rank}).trial_config({})
    inputs = TrialInputs.load(config.base, prepare(config.data, config.base))
    engine, _ = engine_for(inputs.base, [config], inputs.train, inputs.held_out, SLOTS)
    gc.collect()
    gc.freeze()  # as a worker does
    with tempfile.TemporaryDirectory() as folder:
        times = [set_up(config, inputs, engine, Path(folder)) for _ in range(TRIALS)]
    typical = {f"{part}_s": round(median(each[part] for each in times[1:]), 4) for part in PARTS}
    return {
        "rank": rank,
        "first_s": round(sum(times[0].values()), 4),
        **typical,
        "whole_s": round(median(sum(each.values()) for each in times[1:]), 4),
    }


def set_up(config: Any, inputs: TrialInputs, engine: Engine, folder: Path) -> dict[str, float]:
    """Return the seconds of each part, up to the first batch."""
    at = [time.perf_counter()]
    model = model_from_template(inputs.base, config)
    at.append(time.perf_counter())
    trainer = build_trainer(config, model, inputs.tokenizer, inputs.data, folder)
    at.append(time.perf_counter())
    work = Slot(0, trainer, engine, config, inputs.train, inputs.held_out, WriteNow()).train(None)
    next(work)
    at.append(time.perf_counter())
    work.close()
    gc.collect()
    return {part: end - begin for part, begin, end in zip(PARTS, at, at[1:], strict=False)}


class Starts(ResultKeeper):
    """Notes when Tune starts each trial. Tune pickles the callback, so the times are in a class attribute."""

    at: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.at[trial.trial_id] = time.monotonic()


def in_a_sweep(setting: Setting, rank: int) -> float:
    """Return the median over the trials whose worker and trainable are warm."""
    rates = [1e-4 * (1 + index) for index in range(3 * SLOTS)]
    spec = setting.spec(
        {"steps": 30, "eval_steps": 30, "logging_steps": 1},
        lora={"rank": rank},
        search={"algorithm": "grid", "space": {"training.learning_rate": {"grid": rates}}},
        scheduler={"kind": "none"},
        resources={"max_concurrent": SLOTS, "trials_per_gpu": SLOTS, "cpus_per_trial": 2},
        tracking={"tensorboard": False, "wandb": {"mode": "disabled"}},
    )
    results.ResultKeeper = Starts  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        paths = SweepPaths(Path(folder) / "sweep")
        with first_points(paths) as seen:
            run.run_sweep(spec, paths, lambda _: None)
    waited = [seen[trial] - start for trial, start in sorted(Starts.at.items(), key=lambda each: each[1])]
    return round(median(waited[SLOTS:]), 3)


@contextmanager
def first_points(paths: SweepPaths) -> Iterator[dict[str, float]]:
    """Yield trial -> time at which its first point was on disk, to a few milliseconds. Filled by a thread."""
    seen: dict[str, float] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            for trial in paths.trial_ids():
                metrics = paths.trial(trial).metrics
                if trial not in seen and metrics.is_file() and metrics.stat().st_size:
                    seen[trial] = time.monotonic()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, rank={"type": int, "default": 16})
