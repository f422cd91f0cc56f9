"""Real tokens a second of mixed trials that train together on one base, against one trial alone (batch 4 and 1).

    python -m benchmarks.pack 1.1b --rows train.jsonl
    python -m benchmarks.pack 1.1b --rows train.jsonl --optimizer paged_adamw_8bit --out benchmarks/out/8bit

Ranks are 8 to 64, dropout 0 and 0.1, learning rates 5e-5 and 5e-4. There are 16 slots, and 8 at 7B. The time counts in
which all trials train: from the 60th step of the last one, by which the common buckets are captured, to the last step
of the first one that ends.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from benchmarks.common import Heard, Setting, main, together
from orchestrator.spec import SweepSpec
from orchestrator.training.attempt.events import Logged

SLOTS = {"1.1b": 16, "7b": 8, "tiny": 4}
STEPS, WARM = 160, 60
PEAK_FLOPS = 790e12
"""FLOP/s of dense bf16 matrix products, measured on an H200."""
WEIGHTS = {"1.1b": 1.034e9, "7b": 6.607e9, "tiny": 4e6}
"""Number of weights that each token is multiplied by: all linear layers and the head."""


def measure(setting: Setting, optimizer: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for batch in (4, 1):
        for name, slots in {"pack": SLOTS[setting.shape], "alone": 1}.items():
            # Each in a process of its own: a process keeps the memory of its engine as long as it lives.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                figures[f"{name}_batch_{batch}"] = process.submit(_run, setting, slots, batch, optimizer).result()
            print(name, batch, figures[f"{name}_batch_{batch}"], flush=True)
    speed = {name: each["tokens_per_second"] for name, each in figures.items()}
    return {
        "slots": SLOTS[setting.shape],
        "optimizer": optimizer,
        "figures": figures,
        **speed,
        "over_alone_batch_4": round(speed["pack_batch_4"] / speed["alone_batch_4"], 2),
        "over_alone_batch_1": round(speed["pack_batch_1"] / speed["alone_batch_1"], 2),
        # With a frozen base, a weight takes a product forward and one backward, of 2 operations each.
        "share_of_peak": round(speed["pack_batch_4"] * 4 * WEIGHTS[setting.shape] / PEAK_FLOPS, 3),
    }


def spec_of(setting: Setting, batch: int = 4, **training: Any) -> SweepSpec:
    """Make the spec of the mixed trials: a grid of 16."""
    space = {
        "lora.rank": {"grid": [8, 16, 32, 64]},
        "lora.dropout": {"grid": [0.0, 0.1]},
        "training.learning_rate": {"grid": [5e-5, 5e-4]},
    }
    return setting.spec(
        {"batch_size": batch, "steps": STEPS, "eval_steps": STEPS, "eval_batch_size": 16} | training,
        search={"algorithm": "grid", "space": space, "tied": {"lora.alpha": "2 * lora.rank"}},
    )


def points() -> list[dict[str, Any]]:
    """Return the points of the grid, ordered so that the first ones have every rank."""
    return [
        {"lora.rank": rank, "lora.dropout": dropout, "training.learning_rate": rate}
        for dropout, rate in [(0.1, 5e-4), (0.0, 5e-5), (0.1, 5e-5), (0.0, 5e-4)]
        for rank in (8, 16, 32, 64)
    ]


def _run(setting: Setting, slots: int, batch: int, optimizer: str) -> dict[str, Any]:
    return speed(together(spec_of(setting, batch, optimizer=optimizer), points()[:slots]))


def speed(heard: Heard) -> dict[str, Any]:
    """Return real tokens a second while all trials train, and the peak GPU memory.

    A trial reports its tokens every few steps. Between two reports they are interpolated: the trials report one after
    another, and without this up to two intervals of each trial would be left out.
    """
    logs = [[(at, event) for at, event in each if isinstance(event, Logged)] for each in heard]
    began, ended = (
        max(at for each in logs for at, event in each if event.step == WARM),
        min(each[-1][0] for each in logs),
    )
    tokens = 0.0
    for each in logs:
        at, counted = zip(*((at, event.tokens) for at, event in each), strict=True)
        tokens += np.interp(ended, at, counted) - np.interp(began, at, counted)
    return {
        "tokens_per_second": round(tokens / (ended - began)),
        "peak_gib": max(each[-1][1].peak_memory_gib for each in heard),
    }


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, optimizer={"default": "adamw_torch_fused"})
