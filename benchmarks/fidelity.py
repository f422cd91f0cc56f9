"""Eight trials by both engines on a GPU: evaluation losses within 0.5%, in the same order; graphs on and off.

    python -m benchmarks.fidelity 1.1b --rows train.jsonl

Ranks, alphas, rates and dropout vary; both engines draw their own dropout masks.
"""

from typing import Any

from benchmarks.common import BASELINES, Setting, forget, main, run
from orchestrator.training.fast import build

TRIALS = [
    {"rank": rank, "alpha": 2 * rank, "dropout": dropout, "learning_rate": rate}
    for rank, dropout, rate in [
        (8, 0.0, 1e-4),
        (8, 0.1, 1e-3),
        (16, 0.1, 2e-4),
        (16, 0.0, 5e-4),
        (32, 0.1, 1e-4),
        (32, 0.05, 5e-4),
        (64, 0.1, 2e-4),
        (64, 0.1, 1e-3),
    ]
]
STEPS = {"steps": 40, "eval_steps": 40, "eval_batch_size": 16}


def measure(setting: Setting) -> dict[str, Any]:
    losses: dict[str, list[float]] = {"trl": [], "fast": [], "eager": []}
    for engine, training in {"trl": BASELINES["B"], "fast": {"engine": "fast"}}.items():
        for trial in TRIALS:
            losses[engine].append(_loss(setting, trial, training))
            print(engine, trial, losses[engine][-1], flush=True)
        forget()
    build.GRAPHS = False
    losses["eager"] = [_loss(setting, trial, {"engine": "fast"}) for trial in TRIALS[1:3]]
    apart = [abs(fast / trl - 1) for fast, trl in zip(losses["fast"], losses["trl"], strict=True)]
    pairs = [(i, j) for i in range(len(TRIALS)) for j in range(i) if _differ(losses["trl"][i], losses["trl"][j])]
    swapped = [
        (i, j) for i, j in pairs if (losses["trl"][i] < losses["trl"][j]) != (losses["fast"][i] < losses["fast"][j])
    ]
    return {
        "losses": losses,
        "largest_difference": round(max(apart), 5),
        "pairs_apart": len(pairs),
        "pairs_swapped": len(swapped),
        "graphs_on_off": max(abs(a / b - 1) for a, b in zip(losses["fast"][1:3], losses["eager"], strict=True)),
    }


def _loss(setting: Setting, trial: dict[str, Any], training: dict[str, Any]) -> float:
    lora = {name: trial[name] for name in ("rank", "alpha", "dropout")}
    spec = setting.spec(training | STEPS | {"learning_rate": trial["learning_rate"]}, lora=lora)
    result = run(spec).result
    assert result.best is not None
    return result.best.value


def _differ(first: float, second: float) -> bool:
    return abs(first / second - 1) > 0.005


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
