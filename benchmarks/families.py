"""A base of any family: tokens a second of the fast engine, alone and together, and of trl; memory; and the same loss.

    python -m benchmarks.families qwen3-8b --rows train.jsonl
    python -m benchmarks.families gemma-3-4b --rows train.jsonl --slots 4

Batch 4, rank 16. trl is tuned (baseline B). The time counts from the 20th step of a trial, and for trials together from
the 60th step of the last one, by which the common buckets are captured.
"""

from typing import Any

from benchmarks.common import BASELINES, Setting, forget, main, predicted_over_measured, run, together
from benchmarks.fidelity import last_loss
from benchmarks.pack import points, spec_of, speed

STEPS, WARM = 60, 20


def measure(setting: Setting, slots: int) -> dict[str, Any]:
    steps = {"steps": STEPS, "eval_steps": STEPS, "eval_batch_size": 16}
    figures: dict[str, Any] = {}
    losses: dict[str, float] = {}
    for name, training in {"fast": {"engine": "fast"}, "trl": BASELINES["B"]}.items():
        done = run(setting.spec(training | steps))
        losses[name] = last_loss(done)
        figures[f"{name}_tokens_per_second"] = round(done.tokens_per_second(WARM))
        figures[f"{name}_peak_gib"] = done.result.peak_memory_gib
        if name == "fast":
            figures["predicted_over_measured"] = predicted_over_measured(done.result)
            figures["plan"] = done.result.memory_plan
        print(name, figures, losses, flush=True)
        forget()
    if slots > 1:
        joint = speed(together(spec_of(setting, steps=120, eval_steps=120), points()[:slots]))
        figures |= {"slots": slots, **{f"together_{name}": value for name, value in joint.items()}}
        figures["together_over_trl"] = round(joint["tokens_per_second"] / figures["trl_tokens_per_second"], 2)
    return figures | {
        "losses": losses,
        "alone_over_trl": round(figures["fast_tokens_per_second"] / figures["trl_tokens_per_second"], 2),
        "losses_apart": round(abs(losses["fast"] / losses["trl"] - 1), 5),
    }


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, slots={"type": int, "default": 8})
