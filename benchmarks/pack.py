"""Real tokens a second of a pack of mixed trials on one base, against one trial alone; with batches of 4 and of 1.

    python -m benchmarks.pack 1.1b --rows train.jsonl
    python -m benchmarks.pack 1.1b --rows train.jsonl --optimizer paged_adamw_8bit --out benchmarks/out/8bit

Ranks 8 to 64, dropout 0 and 0.1, rates 5e-5 to 5e-4; 16 slots, 8 at 7B. Counted is the time in which all members train:
from the last one's 60th step, by which the common buckets are captured, to the first one's last.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.common import Setting, Told, main, together
from orchestrator.spec import SweepSpec
from orchestrator.training.attempt.events import Logged

SLOTS = {"1.1b": 16, "7b": 8, "tiny": 4}
STEPS, WARM = 160, 60
PEAK_FLOPS = 790e12
"""Dense bf16 products, measured on an H200."""
WEIGHTS = {"1.1b": 1.034e9, "7b": 6.607e9, "tiny": 4e6}
"""That each token is multiplied by: all linear layers and the head."""


def measure(setting: Setting, optimizer: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for batch in (4, 1):
        for name, slots in {"pack": SLOTS[setting.shape], "alone": 1}.items():
            # Each in a process of its own: a host keeps its engine's memory as long as its process lives.
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
        # A frozen base: a product forward and one backward, each of 2 operations a weight.
        "share_of_peak": round(speed["pack_batch_4"] * 4 * WEIGHTS[setting.shape] / PEAK_FLOPS, 3),
    }


def spec_of(setting: Setting, batch: int = 4, **training: Any) -> SweepSpec:
    """The mixed trials: a grid of 16."""
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
    """The grid's, the first ones of every rank."""
    return [
        {"lora.rank": rank, "lora.dropout": dropout, "training.learning_rate": rate}
        for dropout, rate in [(0.1, 5e-4), (0.0, 5e-5), (0.1, 5e-5), (0.0, 5e-4)]
        for rank in (8, 16, 32, 64)
    ]


def _run(setting: Setting, slots: int, batch: int, optimizer: str) -> dict[str, Any]:
    return speed(together(spec_of(setting, batch, optimizer=optimizer), points()[:slots]))


def speed(told: Told) -> dict[str, Any]:
    """Real tokens a second while all of these trials train, and the peak of the GPU's memory."""
    logs = [[(at, event) for at, event in each if isinstance(event, Logged)] for each in told]
    began, ended = (
        max(at for each in logs for at, event in each if event.step == WARM),
        min(each[-1][0] for each in logs),
    )
    tokens = 0
    for each in logs:
        inside = [event.tokens for at, event in each if began <= at <= ended]
        tokens += inside[-1] - inside[0]
    return {
        "tokens_per_second": round(tokens / (ended - began)),
        "peak_gib": max(each[-1][1].peak_memory_gib for each in told),
    }


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, optimizer={"default": "adamw_torch_fused"})
