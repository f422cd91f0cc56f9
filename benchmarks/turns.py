"""How busy the GPU is while trials train and evaluate together, and where it waits.

    python -m benchmarks.turns 1.1b --rows train.jsonl

The trials are the mixed ones of `benchmarks.pack`, with 100 steps and an evaluation every 25. Turns count in which all
trials take part, without the first quarter of them. `train_tokens_per_second` covers the turns that train, including
graph captures and logging, but no evaluations. On a CPU only the turns are reported.
"""

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch

from benchmarks.common import Setting, main, together
from benchmarks.pack import SLOTS, points, spec_of
from orchestrator.training.fast.drive.multi_lora import MultiLora
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch

STEPS, EVAL_STEPS = 100, 25
LONG_MS = 5.0
"""Shortest gap that is listed, in milliseconds."""


def measure(setting: Setting) -> dict[str, Any]:
    slots = SLOTS[setting.shape]
    turns: list[tuple[str, int, float, float]] = []
    """For each turn: kind, number of members, begin and end."""
    replays: list[tuple[float, Any, Any]] = []
    """For each replay of a graph: when it was sent, and the CUDA events of its begin and end."""
    tokens: list[tuple[float, int, int]] = []
    """For each step: when it was sent, its real tokens and the tokens of its bucket."""
    turn, step, replay = MultiLora.turn, Engine.step, torch.cuda.CUDAGraph.replay

    def timed_turn(multi_lora: MultiLora) -> None:
        evaluates = any(isinstance(member.task, EvaluationBatch) for member in multi_lora._members)
        kind, members, began = "evaluation" if evaluates else "train", len(multi_lora), time.perf_counter()
        turn(multi_lora)
        turns.append((kind, members, began, time.perf_counter()))

    def counted_step(engine: Engine, spans: Any) -> Any:
        tokens.append(
            (time.perf_counter(), sum(span.num_tokens for span in spans), engine._bucket_shape([spans]).num_tokens)
        )
        return step(engine, spans)

    def timed_replay(graph: Any) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay(graph)
        end.record()
        replays.append((time.perf_counter(), begin, end))

    MultiLora.turn, Engine.step = timed_turn, counted_step  # type: ignore[method-assign]
    torch.cuda.CUDAGraph.replay = timed_replay
    try:
        together(spec_of(setting, steps=STEPS, eval_steps=EVAL_STEPS), points()[:slots])
    finally:
        MultiLora.turn, Engine.step, torch.cuda.CUDAGraph.replay = turn, step, replay  # type: ignore[method-assign]
    whole = [each for each in turns if each[1] == slots]
    start, end = whole[len(whole) // 4][2], whole[-1][3]
    spent: dict[str, float] = defaultdict(float)
    for kind, _, began, ended in turns:
        if start <= began < end:
            spent[kind] += ended - began
    real, filled = (sum(each[place] for each in tokens if start <= each[0] < end) for place in (1, 2))
    return {
        "window_s": round(end - start, 2),
        "train_tokens_per_second": round(real / spent["train"]),
        "real_tokens": round(real / filled, 3),
        "turns_s": {kind: round(seconds, 2) for kind, seconds in spent.items()},
        **_of_gpu([each for each in replays if start <= each[0] < end], end - start),
    }


def _of_gpu(replays: list[tuple[float, Any, Any]], window_s: float) -> dict[str, Any]:
    """Return the fraction of the time in which a graph runs, and the gaps between consecutive graphs."""
    if not replays:
        return {}
    torch.cuda.synchronize()
    busy_ms = sum(begin.elapsed_time(end) for _, begin, end in replays)
    gaps = [first[2].elapsed_time(second[1]) for first, second in pairwise(replays)]
    return {
        "busy": round(busy_ms / 1e3 / window_s, 3),
        "gaps_s": round(sum(gaps) / 1e3, 2),
        "long_gaps_ms": [round(gap) for gap in gaps if gap > LONG_MS],
    }


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
