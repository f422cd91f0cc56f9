"""Parts that the benchmarks share: the setting, ways to run trials, and the output."""

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.base import evict, guarded
from orchestrator.data import prepare
from orchestrator.record import MetricPoint, SweepPaths, TrialResult, read_metrics
from orchestrator.spec import SweepSpec
from orchestrator.spec.load import parse_spec
from orchestrator.training.attempt.events import END, Completed, Event
from orchestrator.training.engines.choose import find_slot, open_loop
from orchestrator.training.engines.loop import Loop
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.multi_lora import MultiLora
from orchestrator.training.local import run_local_trial
from orchestrator.training.trial import trial_so_far
from orchestrator.training.worker.runtime import WorkerRuntime
from orchestrator.training.write_queue import WriteNow

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "triton")

BASELINES: dict[str, dict[str, Any]] = {
    "A": {"engine": "trl", "recompute": True, "optimizer": "paged_adamw_32bit"},
    "B": {"engine": "trl", "recompute": False, "optimizer": "adamw_torch_fused"},
}
"""Baselines: A has trl's defaults, B is tuned. Both have the adapter in float32, as the fast engine does."""


@dataclass(frozen=True)
class Setting:
    """A base of a well-known shape with random weights, and GSM8K rows in `[INST]` form."""

    shape: str
    base: Path
    rows: Path
    out: Path
    row_tokens: int | None = None
    """Tokens of each row, where rows are long enough to be cut; None for rows as they are, up to 512 tokens."""

    def spec(self, training: dict[str, Any], **sections: dict[str, Any]) -> SweepSpec:
        """Make a spec: batch 4, rank 16 on all linear layers, dropout 0.1.

        Args:
            training: fields of `training:` that are added or replaced.
            sections: fields of other sections, likewise.
        """
        document: dict[str, Any] = {
            "base": {"model": str(self.base)},
            "data": {
                "source": str(self.rows),
                "format": "template",
                "template": "<s>[INST] {question} [/INST] {answer} </s>",
                "loss_on": "completion",
                "max_length": self.row_tokens or 512,
                "require_stop": self.row_tokens is None,  # rows that are cut do not end with a stop token
                "max_rows": 2000,
                "held_out": {"count": 100},
            },
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.1},
            "training": {"batch_size": 4, "eval_batch_size": 4, "learning_rate": 2e-4, "logging_steps": 10} | training,
            "tracking": {"wandb": {"mode": "disabled"}},
        }
        for name, fields in sections.items():
            document[name] = document.get(name, {}) | fields
        return parse_spec(document, "benchmark")


@dataclass(frozen=True)
class Run:
    """One trial's result, its metrics, and the seconds of the whole call."""

    result: TrialResult
    points: list[MetricPoint]
    seconds: float

    def tokens_per_second(self, after: int) -> float:
        """Return real tokens a second, from the first training point at or after a step to the last training point."""
        points = [point for point in self.points if "train/loss" in point.values and point.step >= after]
        return (points[-1].tokens - points[0].tokens) / (points[-1].time_s - points[0].time_s)


class Silent:
    """A watcher that stops nothing, and notes the time of the first step."""

    first_step: float | None = None

    def on_step(self, step: int, total_steps: int) -> bool:
        self.first_step = self.first_step or time.time()
        return True

    def on_report(self, point: MetricPoint) -> bool:
        return True

    def say(self, sentence: str) -> None:
        print(sentence)


def run(spec: SweepSpec, watcher: Silent | None = None) -> Run:
    """Train one trial as `orchestrator trial` does, in this process. Base and engine stay cached."""
    with tempfile.TemporaryDirectory() as folder:
        paths, start = SweepPaths(Path(folder) / "trial"), time.monotonic()
        result = run_local_trial(spec, paths, watcher or Silent())
        seconds = time.monotonic() - start
        assert result is not None
        return Run(result, read_metrics(paths.trial(result.trial_id)), seconds)


Heard = list[list[tuple[float, Event]]]
"""For each trial, its events, each with the time at which it was received (perf_counter)."""


def together(spec: SweepSpec, points: Sequence[dict[str, Any]]) -> Heard:
    """Train trials together in this process, as a worker does."""
    heard: Heard = [[] for _ in points]
    with tempfile.TemporaryDirectory() as folder:
        paths, runtime = SweepPaths(Path(folder)), WorkerRuntime(spec, prepare(spec.data, spec.base), len(points), 1)
        for index, point in enumerate(points):
            trial = paths.trial(f"trial-{index}")
            assert runtime.start(trial.trial_id, trial_so_far(spec.trial_config(point), spec, trial), trial)
        wait_s = 0.0 if len(points) > 1 else 1.0
        while training := [index for index, each in enumerate(heard) if not (each and isinstance(each[-1][1], END))]:
            for index in training:
                heard[index] += [(time.perf_counter(), event) for event in runtime.events(f"trial-{index}", wait_s)]
            time.sleep(0.002)
    for each in heard:
        assert isinstance(each[-1][1], Completed), each[-1]
    return heard


@contextmanager
def opened(setting: Setting, training: dict[str, Any]) -> Iterator[tuple[Loop, MultiLora, int]]:
    """Yield a trial's loop before it runs, the `MultiLora` that steps it, and the tokens of its held-out rows."""
    config = setting.spec(training).trial_config({})
    inputs = TrialInputs.load(config.base, prepare(config.data, config.base))
    with guarded(config.base), tempfile.TemporaryDirectory() as folder:
        engine_slot = find_slot(config, inputs)
        yield (
            open_loop(config, inputs, engine_slot, Path(folder), WriteNow()),
            MultiLora(),
            int(inputs.held_out.lengths.sum()),
        )


def predicted_over_measured(result: TrialResult) -> float | None:
    """Return predicted peak memory over measured peak memory; None unless a fast trial ran on a GPU."""
    plan = result.memory_plan or {}
    return round(plan["predicted_gib"] / plan["measured_gib"], 3) if "predicted_gib" in plan else None


def forget() -> None:
    """Free the GPU memory that earlier runs keep, so that the next measurement does not include it."""
    import torch

    evict()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(about: str, measure: Callable[..., dict[str, Any]], **options: dict[str, Any]) -> None:
    """Parse the command line, measure, write `OUT/<name>-<shape>.json`, print a table row.

    Args:
        about: description of the benchmark.
        measure: gets the setting, and each further option by its name; returns the numbers to write.
        options: name of an option -> keyword arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("shape", help="a shape of scripts/make_base.py; tiny, thin: for a CPU")
    parser.add_argument("--rows", type=Path, required=True, help="path of GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the JSON output")
    parser.add_argument("--bases", type=Path, default=Path(tempfile.gettempdir()) / "bases", help="folder of bases")
    for name, option in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    arguments = parser.parse_args()
    base = arguments.bases / arguments.shape
    if not (base / "config.json").is_file():
        command = [sys.executable, ROOT / "scripts" / "make_base.py", arguments.shape, base, "--text", arguments.rows]
        subprocess.run(command, check=True)
    setting = Setting(arguments.shape, base.resolve(), arguments.rows.resolve(), arguments.out)
    name, figures = Path(sys.argv[0]).stem, measure(setting, **{name: getattr(arguments, name) for name in options})
    figures = {"benchmark": name, "shape": arguments.shape, **figures}
    write(arguments.out / f"{name}-{arguments.shape}.json", figures)
    print(" | ".join(f"{key}: {value}" for key, value in figures.items() if not isinstance(value, dict)), flush=True)


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write numbers with hardware, versions, commit and date, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures | environment(), indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Return hardware, versions, commit and date."""
    import torch

    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git.stdout.strip() or None,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None
