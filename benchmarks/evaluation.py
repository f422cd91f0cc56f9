"""Real tokens a second of an evaluation of 100 rows: the fast engine against trl's `evaluate` (batch 4 and 16).

python -m benchmarks.evaluation 1.1b --rows train.jsonl
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import BASELINES, Setting, forget, main, opened
from orchestrator.training.fast.drive.slot import Slot

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
        forget()
        with opened(setting, training | {"steps": 1, "eval_steps": 1}) as (loop, multi_lora, tokens):
            multi_lora.join(loop.train(None))
            while len(multi_lora):
                multi_lora.turn()
            if isinstance(loop, Slot):
                batch = loop.evaluation()
                seconds[name] = _best(lambda batch=batch: batch.engine.evaluate([batch]))
            else:
                seconds[name] = _best(loop.trainer.evaluate)
            losses[name] = loop.scores().loss
    return {
        "tokens_per_second": {name: round(tokens / each) for name, each in seconds.items()},
        "over_trl": round(seconds["trl"] / seconds["fast"], 2),
        "over_trl_batch_16": round(seconds["trl_batch_16"] / seconds["fast"], 2),
        "eval_loss": losses,
    }


def _best(evaluate: Callable[[], Any]) -> float:
    """Return the seconds of the fastest evaluation of several, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        evaluate()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
