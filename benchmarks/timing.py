"""Times of GPU work, as medians of CUDA graph replays."""

import statistics
from collections.abc import Callable, Sequence

import torch


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture a call as a graph, after one call to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Return the median milliseconds of a replay, after three to warm up."""
    times: list[float] = []
    for _ in range(3 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def time_calls(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median microseconds of a call, in a graph of at least 20."""
    calls = [*calls] * -(-20 // len(calls))

    def run() -> None:
        for call in calls:
            call()

    return time_graph(capture(run), 10) * 1e3 / len(calls)
