"""A base of any family: tokens a second of the fast engine, alone and together, and of trl; memory; and the same loss.

    python -m benchmarks.families qwen3-8b --rows train.jsonl
    python -m benchmarks.families gemma-3-4b --rows train.jsonl --slots 4
    python -m benchmarks.families phi-4 --rows train.jsonl --row-tokens 2048 --out benchmarks/out/2048

Batch 4, rank 16. trl is tuned (baseline B); where that does not fit into memory, it recomputes (B with recompute). The
time counts from the 20th step of a trial, and for trials together from the 60th step of the last one, by which the
common buckets are captured. Rows are those of GSM8K, or several of them joined to rows of a fixed length.
"""

from dataclasses import replace
from typing import Any

from benchmarks.common import BASELINES, Run, Setting, forget, main, predicted_over_measured, run, together
from benchmarks.fidelity import last_loss
from benchmarks.long_rows import write_long_rows
from benchmarks.pack import points, spec_of, speed
from orchestrator.errors import TrialError

STEPS, WARM = 60, 20


def measure(setting: Setting, slots: int, row_tokens: int | None) -> dict[str, Any]:
    figures: dict[str, Any] = {"row_tokens": row_tokens}
    if row_tokens is not None:
        rows = setting.out / f"rows-{setting.shape}-{row_tokens}.jsonl"
        write_long_rows(setting.rows, setting.base, row_tokens, rows)
        setting = replace(setting, rows=rows.resolve(), row_tokens=row_tokens)
    # trl has the logits of all rows of a batch in memory.
    evaluation = {"eval_batch_size": 16 if row_tokens is None else 4}
    steps = {"steps": STEPS, "eval_steps": STEPS} | evaluation
    losses: dict[str, float] = {}
    for name in ("fast", "trl"):
        if name == "fast":
            done = run(setting.spec({"engine": "fast"} | steps))
        else:
            figures["baseline"], done = _by_trl(setting, steps)
        losses[name] = last_loss(done)
        figures[f"{name}_tokens_per_second"] = round(done.tokens_per_second(WARM))
        figures[f"{name}_peak_gib"] = done.result.peak_memory_gib
        if name == "fast":
            figures["predicted_over_measured"] = predicted_over_measured(done.result)
            figures["plan"] = done.result.memory_plan
        print(name, figures, losses, flush=True)
        forget()
    if slots > 1:
        joint = speed(together(spec_of(setting, steps=120, eval_steps=120, **evaluation), points()[:slots]))
        figures |= {"slots": slots, **{f"together_{name}": value for name, value in joint.items()}}
        figures["together_over_trl"] = round(joint["tokens_per_second"] / figures["trl_tokens_per_second"], 2)
    return figures | {
        "losses": losses,
        "alone_over_trl": round(figures["fast_tokens_per_second"] / figures["trl_tokens_per_second"], 2),
        "losses_apart": round(abs(losses["fast"] / losses["trl"] - 1), 5),
    }


def _by_trl(setting: Setting, steps: dict[str, Any]) -> tuple[str, Run]:
    """Train by trl, tuned; return the baseline's name and the run."""
    try:
        return "B", run(setting.spec(BASELINES["B"] | steps))
    except TrialError as error:
        if "out of GPU memory" not in str(error):
            raise
        forget()
    return "B with recompute", run(setting.spec(BASELINES["B"] | {"recompute": True} | steps))


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        measure,
        slots={"type": int, "default": 8},
        row_tokens={"type": int, "help": "tokens of each row; without it, rows are those of GSM8K"},
    )
