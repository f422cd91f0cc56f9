"""What `plan` foresees beside what a GPU measures: peak memory, time of a step, and the makespan of a sweep.

    python -m benchmarks.planning 1.1b --rows train.jsonl
    python -m benchmarks.planning 7b --rows train.jsonl

Four settings of a shape: alone with rank 8 and batches of 1; alone with rank 128 and batches of 16; alone with rows of
4,096 tokens; and 8 trials of ranks 8 to 128 together, as a sweep. Rows have up to 512 tokens, except in the third.
Targets: memory within 10%, steps within 15%, the makespan within 20%. `benchmarks.planning_figures` compares the
model with earlier figures, without a GPU.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import Setting, forget, main, run
from benchmarks.long_rows import write_long_rows
from benchmarks.sweep import sweep_ours
from orchestrator.planning.gpus import budget_here, gpu_here
from orchestrator.planning.models import SweepPlan
from orchestrator.planning.sweep_plan import plan_sweep
from orchestrator.spec import SweepSpec

STEPS, LONG = 60, 4096
ALONE = {
    "rank 8, batch 1": (8, 1, None),
    "rank 128, batch 16": (128, 16, None),
    "rank 16, batch 4, 4,096 tokens": (16, 4, LONG),
}
"""Name -> rank, rows of a batch, tokens of a row."""


def measure(setting: Setting) -> dict[str, Any]:
    figures = {}
    for name, (rank, batch, row_tokens) in ALONE.items():
        spec = _setting(setting, row_tokens).spec(
            {"batch_size": batch, "steps": STEPS, "eval_steps": STEPS}, lora={"rank": rank, "alpha": 2 * rank}
        )
        figures[name] = _alone(spec)
        print(name, figures[name], flush=True)
        forget()
    figures["8 trials, ranks 8 to 128"] = _sweep(setting)
    return {"figures": figures}


def _setting(setting: Setting, row_tokens: int | None) -> Setting:
    if row_tokens is None:
        return setting
    rows = setting.out / f"rows-{setting.shape}-{row_tokens}.jsonl"
    write_long_rows(setting.rows, setting.base, row_tokens, rows)
    return replace(setting, rows=rows.resolve(), row_tokens=row_tokens)


def _planned(spec: SweepSpec) -> SweepPlan:
    gpu = gpu_here()
    assert gpu is not None, "needs a GPU that `plan` knows"
    return plan_sweep(spec, "benchmark", gpu, budget=budget_here())


def _alone(spec: SweepSpec) -> dict[str, Any]:
    """Compare a trial alone. It runs twice: the first one captures the graphs of its batches."""
    (corner,) = _planned(spec).corners
    assert corner.step_s is not None
    run(spec)
    result = run(spec).result
    assert result.tokens_per_second is not None
    assert result.memory_plan is not None
    step_s, peak_gib = result.tokens / result.tokens_per_second / STEPS, result.memory_plan["measured_gib"]
    return {
        "memory": _compared(corner.total_gib, peak_gib),
        "step_ms": _compared(corner.step_s * 1e3, step_s * 1e3),
    }


def _sweep(setting: Setting) -> dict[str, Any]:
    """Compare a sweep: its whole command with a cold kernel cache, and the memory of its engine."""
    space = {"lora.rank": {"grid": [8, 16, 64, 128]}, "training.learning_rate": {"grid": [5e-5, 5e-4]}}
    spec = setting.spec(
        {"steps": 200, "eval_steps": 50, "eval_batch_size": 16},
        search={"algorithm": "grid", "space": space, "tied": {"lora.alpha": "2 * lora.rank"}},
        scheduler={"kind": "none"},
    )
    plan = _planned(spec)
    forget()
    assert plan.whole is not None
    with tempfile.TemporaryDirectory() as folder:
        swept = sweep_ours(spec.model_dump(mode="json"), Path(folder), "planning")
    memory = swept.trials()[0].memory_plan
    assert memory is not None
    return {
        "slots": plan.slots,
        "makespan_s": _compared(plan.whole.total_s, swept.seconds),
        "memory": _compared(memory["predicted_gib"], memory["measured_gib"]),
        "tokens": _compared(plan.whole.tokens, sum(trial.tokens for trial in swept.trials())),
    }


def _compared(foreseen: float | None, measured: float) -> dict[str, float]:
    assert foreseen is not None
    return {"foreseen": round(foreseen, 3), "measured": round(measured, 3), "ratio": round(foreseen / measured, 3)}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
