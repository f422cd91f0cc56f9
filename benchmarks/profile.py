"""Measure how a step of the fast engine spends its time on the GPU, by kernel.

python -m benchmarks.profile 1.1b --rows train.jsonl
"""

import time
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Setting, main, opened
from orchestrator.training.fast.drive.multi_lora import Batch
from orchestrator.training.fast.drive.slot import Slot
from orchestrator.training.fast.step.flat_batch import Span

STEPS = 20


def measure(setting: Setting) -> dict[str, Any]:
    """Send the same steps to capture their graphs, to time them, to time the host alone, and under the profiler."""
    with opened(setting, {"engine": "fast", "steps": 500, "eval_steps": 500}) as (slot, _, _):
        assert isinstance(slot, Slot)
        batches = slot.begin(None)
        sample = [next(batches)[1] for _ in range(STEPS)]

        def send(batch: Batch) -> None:
            span = Span(batch.slot, batch.rows, batch.indices, batch.table)
            slot.sent(batch, [batch.engine.step([span])])

        captured = time.perf_counter()
        for batch in sample:
            send(batch)
        slot.collect()
        captured = time.perf_counter() - captured
        start = time.perf_counter()
        for batch in sample:
            send(batch)
        slot.collect()
        seconds = time.perf_counter() - start
        host = time.perf_counter()
        for batch in sample[:4]:
            send(batch)
        host = (time.perf_counter() - host) / 4
        slot.collect()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for batch in sample:
                send(batch)
            slot.collect()
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time
            counts[event.name] += 1
    kernels = {
        name[:90]: {"ms_a_step": round(spent / STEPS / 1e3, 4), "launches_a_step": round(counts[name] / STEPS, 1)}
        for name, spent in sorted(times.items(), key=lambda item: -item[1])[:40]
    }
    for name, each in kernels.items():
        print(f"{each['ms_a_step']:9.4f} ms {each['launches_a_step']:7.1f}  {name}")
    return {
        "ms_a_step": round(seconds / STEPS * 1e3, 3),
        "host_ms_a_step": round(host * 1e3, 3),
        "kernel_ms_a_step": round(sum(times.values()) / STEPS / 1e3, 3),
        "capture_s": round(captured, 2),
        "kernels": kernels,
    }


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
