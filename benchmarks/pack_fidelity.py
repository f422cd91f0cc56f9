"""16 mixed trials that train together, against each alone in trl (B): losses within 0.5%, in the same order.

    python -m benchmarks.pack_fidelity 1.1b --rows train.jsonl

Ranks are 8 to 64, dropout 0 and 0.1, learning rates 5e-5 to 5e-4. A trial has its own seed and two evaluations of 100
rows. Each engine draws its own dropout masks. No recorded gradient norm may be zero.
"""

import time
from typing import Any

from benchmarks.common import BASELINES, Setting, forget, main, together
from benchmarks.fidelity import compare, run_alone
from benchmarks.pack import spec_of
from orchestrator.training.attempt.events import Evaluated, Logged

RATES = (5e-5, 1e-4, 2e-4, 5e-4)
TRIALS = [
    {
        "lora.rank": (8, 16, 32, 64)[index % 4],
        "lora.dropout": (0.1, 0.0)[(index % 4 // 2 + index // 4) % 2],
        "training.learning_rate": RATES[(index + index // 4) % 4],
        "training.seed": index,
    }
    for index in range(16)
]


def measure(setting: Setting, trials: int, steps: int) -> dict[str, Any]:
    points, training = TRIALS[:trials], {"steps": steps, "eval_steps": -(-steps // 2), "eval_batch_size": 16}
    losses: dict[str, list[list[float]]] = {"trl": [], "packed": []}
    norms: dict[str, list[float]] = {"trl": [], "packed": []}
    began = time.monotonic()
    for point in points:
        alone = {**point, "lora.alpha": 2 * point["lora.rank"]}
        heard = [each.values for each in run_alone(setting, alone, training | BASELINES["B"]).points]
        losses["trl"].append([values["eval/loss"] for values in heard if "eval/loss" in values])
        norms["trl"].append(min(values["train/grad_norm"] for values in heard if "train/grad_norm" in values))
        print("trl", point, losses["trl"][-1], f"{time.monotonic() - began:.0f} s", flush=True)
    forget()
    for events in together(spec_of(setting, **training, engine="fast"), points):
        losses["packed"].append([event.values["eval/loss"] for _, event in events if isinstance(event, Evaluated)])
        norms["packed"].append(min(event.values["train/grad_norm"] for _, event in events if isinstance(event, Logged)))
    last = {name: [each[-1] for each in of_trials] for name, of_trials in losses.items()}
    return {
        "trials": {index: point | {name: last[name][index] for name in last} for index, point in enumerate(points)},
        **compare(last["trl"], last["packed"]),
        "smallest_gradient_norm": {name: min(each) for name, each in norms.items()},
        "losses": losses,
    }


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        measure,
        trials={"type": int, "default": len(TRIALS), "help": "number of trials"},
        steps={"type": int, "default": 60, "help": "steps of each trial"},
    )
