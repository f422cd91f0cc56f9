"""Peak GPU memory of one trial, predicted and measured: base kept or dequantized at each use, against trl (B).

python -m benchmarks.memory 7b --rows train.jsonl
"""

from typing import Any

from benchmarks.common import BASELINES, Setting, forget, main, predicted_over_measured, run

FORMS: dict[str, dict[str, Any]] = {
    "kept": {"engine": "fast", "dequantize": "once"},
    "not_kept": {"engine": "fast", "dequantize": "per_layer"},
    "recomputed": {"engine": "fast", "dequantize": "per_layer", "recompute": True},
    "B": BASELINES["B"],
}


def measure(setting: Setting) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, training in FORMS.items():
        forget()
        done = run(setting.spec(training | {"steps": 30, "eval_steps": 30}))
        figures[name] = {
            "measured_gib": done.result.peak_memory_gib,
            "predicted_over_measured": predicted_over_measured(done.result),
            "tokens_per_second": round(done.tokens_per_second(after=10)),
            "eval_loss": done.result.best.value if done.result.best else None,
        }
    return {"forms": figures, **{name: each["measured_gib"] for name, each in figures.items()}}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
