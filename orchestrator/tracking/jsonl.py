"""Write `metrics.jsonl`, with one `MetricPoint` per line."""

from orchestrator.record import MetricPoint, TrialPaths, read_metrics
from orchestrator.record.files import append_line, write_atomic


class JsonlTracker:
    """Appends points. A resumed trial first drops the points that it will measure again."""

    name = "JSONL"

    def __init__(self, paths: TrialPaths, resumed_step: int) -> None:
        kept = [point for point in read_metrics(paths) if point.step <= resumed_step]
        write_atomic(paths.metrics, "".join(f"{point.model_dump_json()}\n" for point in kept))
        self._path = paths.metrics

    def log(self, point: MetricPoint) -> None:
        append_line(self._path, point.model_dump_json())
