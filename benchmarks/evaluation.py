"""Real tokens a second of an evaluation of 100 rows: fast, against trl's `evaluate` (batch 4 and 16).

python -m benchmarks.evaluation 1.1b --rows train.jsonl
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import BASELINES, Setting, forget, main
from orchestrator.base import lease, load_tokenizer
from orchestrator.data import prepare
from orchestrator.training.applied import expected_modules
from orchestrator.training.fast.slot import Slot
from orchestrator.training.loop import open_loop

REPEATS = 5


def measure(setting: Setting) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    losses: dict[str, float] = {}
    forms = {
        "trl": BASELINES["B"],
        "trl_batch_16": BASELINES["B"] | {"eval_batch_size": 16},
        "fast": {"engine": "fast"},
    }
    for name, training in forms.items():
        config = setting.spec(training | {"steps": 1, "eval_steps": 1}).trial_config({})
        data = prepare(config.data, config.base)
        tokens = sum(len(row) for row in data.held_out["input_ids"])
        forget()
        with lease(config.base) as base, tempfile.TemporaryDirectory() as folder:
            modules = expected_modules(base, config.lora)
            loop, _ = open_loop(config, base, modules, load_tokenizer(config.base), data, Path(folder))
            loop.train(None)
            seconds[name] = _best(loop.evaluate if isinstance(loop, Slot) else loop.trainer.evaluate)
            losses[name] = loop.measured()["eval/loss"]
    return {
        "tokens_per_second": {name: round(tokens / each) for name, each in seconds.items()},
        "over_trl": round(seconds["trl"] / seconds["fast"], 2),
        "over_trl_batch_16": round(seconds["trl_batch_16"] / seconds["fast"], 2),
        "eval_loss": losses,
    }


def _best(evaluate: Callable[[], Any]) -> float:
    """Seconds of the quickest of some, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        evaluate()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
