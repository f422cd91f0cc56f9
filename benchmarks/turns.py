"""How busy the GPU is while a pack trains and evaluates, and where it waits.

    python -m benchmarks.turns 1.1b --rows train.jsonl

The mixed trials of `benchmarks.pack`, 100 steps, evaluated every 25. Counted are the turns in which all members are
there, the first quarter of them left out. `train_tokens_per_second` is of the turns that train: captures and what is
logged are in it, evaluations are not. On a CPU it tells the turns alone.
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
"""Of the gaps that are listed."""


def measure(setting: Setting) -> dict[str, Any]:
    slots = SLOTS[setting.shape]
    turns: list[tuple[str, int, float, float]] = []
    """Of each: its kind, members, begin and end."""
    replays: list[tuple[float, Any, Any]] = []
    """Of each graph's replay: when it was sent, and events of its begin and end."""
    tokens: list[tuple[float, int, int]] = []
    """Of each step: when it was sent, its real tokens and its bucket's."""
    turn, step, replay = MultiLora.turn, Engine.step, torch.cuda.CUDAGraph.replay

    def timed_turn(pack: MultiLora) -> None:
        evaluates = any(isinstance(member.task, EvaluationBatch) for member in pack._members)
        kind, members, began = "evaluation" if evaluates else "train", len(pack), time.perf_counter()
        turn(pack)
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
    """The part of the time in which a graph runs, and the gaps between one's end and the next one's begin."""
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
