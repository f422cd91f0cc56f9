"""Real tokens a second of one trial: the fast engine against trl's SFTTrainer with its defaults (A) and tuned (B).

    python -m benchmarks.speed 1.1b --rows train.jsonl

`fast_first` captures its CUDA graphs as it trains, like the first trial of a worker; `fast` reuses them.
"""

from typing import Any

from benchmarks.common import BASELINES, Run, Setting, forget, main, predicted_over_measured, run


def measure(setting: Setting) -> dict[str, Any]:
    runs: dict[str, Run] = {}
    for name, training in BASELINES.items():
        runs[name] = run(setting.spec(training | {"steps": 30, "eval_steps": 30}))
        forget()
    for name in ("fast_first", "fast"):
        runs[name] = run(setting.spec({"engine": "fast", "steps": 200, "eval_steps": 200}))
    speed = {name: each.tokens_per_second(after=10) for name, each in runs.items()}
    fast = runs["fast"].result
    return {
        "tokens_per_second": {name: round(value) for name, value in speed.items()},
        "over_A": round(speed["fast"] / speed["A"], 2),
        "over_B": round(speed["fast"] / speed["B"], 2),
        "fast": round(speed["fast"]),
        "mean_tokens_a_step": round(fast.tokens / fast.step, 1),
        "seconds": {name: round(each.seconds, 1) for name, each in runs.items()},
        "peak_gib": {name: each.result.peak_memory_gib for name, each in runs.items()},
        "eval_loss": {name: each.result.best.value if each.result.best else None for name, each in runs.items()},
        "memory_plan": fast.memory_plan,
        "predicted_over_measured": predicted_over_measured(fast),
    }


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
