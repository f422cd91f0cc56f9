"""Eight trials in both engines on a GPU: are losses within 0.5% and in the same order? Also CUDA graphs on and off.

    python -m benchmarks.fidelity 1.1b --rows train.jsonl

Ranks, alphas, learning rates and dropout vary. Each engine draws its own dropout masks.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.common import BASELINES, Run, Setting, forget, main, run
from orchestrator.training.fast.plan import factory

TRIALS = [
    {"lora.rank": rank, "lora.alpha": 2 * rank, "lora.dropout": dropout, "training.learning_rate": rate}
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
APART = 0.005
"""Relative difference of the losses that is allowed between the engines."""


def measure(setting: Setting) -> dict[str, Any]:
    losses: dict[str, list[float]] = {"trl": [], "fast": [], "eager": []}
    for engine, training in {"trl": BASELINES["B"], "fast": {"engine": "fast"}}.items():
        for trial in TRIALS:
            losses[engine].append(last_loss(run_alone(setting, trial, training | STEPS)))
            print(engine, trial, losses[engine][-1], flush=True)
        forget()
    factory.GRAPHS = False
    losses["eager"] = [last_loss(run_alone(setting, trial, {"engine": "fast"} | STEPS)) for trial in TRIALS[1:3]]
    return {
        "losses": losses,
        **compare(losses["trl"], losses["fast"]),
        "graphs_on_off": max(abs(a / b - 1) for a, b in zip(losses["fast"][1:3], losses["eager"], strict=True)),
    }


def run_alone(setting: Setting, point: dict[str, Any], training: dict[str, Any]) -> Run:
    """Train one trial by itself. `point` holds fields of `lora:` and `training:`."""
    sections: dict[str, dict[str, Any]] = {"lora": {}, "training": dict(training)}
    for path, value in point.items():
        section, _, name = path.partition(".")
        sections[section][name] = value
    return run(setting.spec(sections["training"], lora=sections["lora"]))


def last_loss(done: Run) -> float:
    """Return the loss of the last evaluation."""
    return [point.values["eval/loss"] for point in done.points if "eval/loss" in point.values][-1]


def compare(trl: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Compare the losses of the same trials: the largest difference, and the order of trials that are clearly apart."""
    pairs = [(i, j) for i in range(len(trl)) for j in range(i) if abs(trl[i] / trl[j] - 1) > APART]
    swapped = [(i, j) for i, j in pairs if (trl[i] < trl[j]) != (ours[i] < ours[j])]
    return {
        "largest_difference": round(max(abs(a / b - 1) for a, b in zip(ours, trl, strict=True)), 6),
        "pairs_apart": len(pairs),
        "pairs_swapped": len(swapped),
    }


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
