"""Compare ways to multiply each slot's tokens by its own LoRA matrices: by slot, `grouped_mm`, and ours.

    python -m benchmarks.products --slots 16 --tokens 12800

The products are those of gate and up at the shape of 1.1B: x A^T, and lora_hidden B^T added to y. Slots have unequal
spans and ranks. A and B have the stack rank, with zeros beyond a slot's own. "ours" are the Triton kernels on a GPU,
where each way is timed as a CUDA graph, and `reference` on a CPU.

Prints the median in milliseconds, and as `rest` the norm of the difference from ours, relative to the norm of ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import capture, time_graph
from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.ops.protocol import Ops, ops_for
from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters, LayerGroup
from orchestrator.training.fast.step.flat_batch import TABLE, BucketShape, FlatBatch, Span, TokenizedRows

HIDDEN, INNER, RANKS, LONGEST = 2048, 5632, (8, 16, 32, 64), 512
REPEATS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=12800, help="of all slots")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as a trial on a CPU does
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    ops = ops_for(on_gpu)
    batch = make_batch(arguments.slots, arguments.tokens, ops.TILE, device)
    layers = [AdaptedLayer("gate", 0, HIDDEN, 0, INNER), AdaptedLayer("up", 1, HIDDEN, INNER, INNER)]
    adapters = Adapters([layers], arguments.slots, max(RANKS), torch.float32, dtype, device)
    for slot, rank in enumerate(batch.table["rank"].tolist()):
        for _, matrix in adapters.matrices(slot, rank, adapters.weights):
            matrix.normal_(std=0.02)
    group = adapters.groups[0]
    assert group is not None
    x = torch.randn(batch.num_tokens, HIDDEN, device=device, dtype=dtype)
    lora_hidden = torch.randn(batch.num_tokens, 2 * max(RANKS), device=device, dtype=dtype)
    y = torch.zeros(batch.num_tokens, 2 * INNER, device=device, dtype=dtype)
    print(torch.cuda.get_device_name() if on_gpu else "CPU", torch.__version__, batch.num_tokens, "tokens")
    ways = {"ours": (lambda x: ops.lora_down(x, adapters, group, batch), _ours_up(ops, adapters, group, batch))}
    ways |= {name: _by(product, adapters, group) for name, product in products(batch).items()}
    first: dict[str, torch.Tensor] = {}
    for name, (down, up) in ways.items():
        for part, run in {"down": lambda down=down: down(x), "up": lambda up=up: up(y, lora_hidden)}.items():
            y.zero_()
            result = run().float().clone()  # a copy: `float` of float32 returns y itself, which the next way clears
            exact = first.setdefault(part, result)
            rest = float((result - exact).norm() / exact.norm())
            print(f"{name:12}{part:6}{milliseconds(run, on_gpu):10.3f}   rest {rest:.1e}", flush=True)


def _ours_up(ops: Ops, adapters: Adapters, group: LayerGroup, batch: FlatBatch) -> Callable[..., Any]:
    def up(y: torch.Tensor, lora_hidden: torch.Tensor) -> torch.Tensor:
        ops.lora_up_(y, lora_hidden, adapters, group, batch)
        return y

    return up


def _by(
    product: Callable[..., Any], adapters: Adapters, group: LayerGroup
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Build both parts from a product (T, k), (S, k, n) -> (T, n). The scales are 1."""
    a, b = adapters.a(group, adapters.weights), adapters.b(group, adapters.weights)
    rank = adapters.rank

    def down(x: torch.Tensor) -> torch.Tensor:
        return product(x, a.mT.to(x.dtype))

    def up(y: torch.Tensor, lora_hidden: torch.Tensor) -> torch.Tensor:
        for index in range(2):
            columns = slice(index * INNER, (index + 1) * INNER)
            part = lora_hidden[:, index * rank : (index + 1) * rank].contiguous()
            y[:, columns] += product(part, b[:, columns].mT.to(lora_hidden.dtype))
        return y

    return down, up


def products(batch: FlatBatch) -> dict[str, Callable[..., Any]]:
    """Return the other ways by name."""
    ends = batch.table["end_tile"] * batch.tile

    def by_slot(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return reference._matmul_by_slot(x, weights, batch)

    def grouped(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, weights, offs=ends)

    return {"by slot": by_slot, "grouped_mm": grouped}


def make_batch(slots: int, tokens: int, tile: int, device: torch.device) -> FlatBatch:
    """Make spans between 0.5 and 1.5 times their mean, in whole tiles."""
    generator, spans = np.random.default_rng(0), []
    shares = generator.uniform(0.5, 1.5, slots)
    for slot, share in enumerate(shares / shares.sum()):
        left, ids = max(1, int(share * tokens) // tile) * tile, []
        while left:
            ids.append(generator.integers(0, 100, min(left, LONGEST)).tolist())
            left -= len(ids[-1])
        table = dict.fromkeys(TABLE, 0.0) | {
            "rank": RANKS[slot % len(RANKS)],
            "scale": 1.0,
            "keep_scale": 1.0,
            "applies": 1,
        }
        spans.append(Span(slot, TokenizedRows(ids, ids), range(len(ids)), table))
    sequences, real = sum(len(span.indices) for span in spans), sum(span.num_tokens for span in spans)
    shape = BucketShape(real, real, sequences + -sequences % 8, slots, tile, LONGEST)
    buffer = shape.buffer("cpu")
    shape.fill(buffer.numpy(), spans)
    return shape.view(buffer.to(device))


def milliseconds(run: Callable[[], Any], on_gpu: bool) -> float:
    """Return the median of a call."""
    if on_gpu:
        return time_graph(capture(run), REPEATS)
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
