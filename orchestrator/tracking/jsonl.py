"""Write `metrics.jsonl`, with one `MetricPoint` per line."""

from orchestrator.record import MetricPoint, TrialPaths, read_metrics
from orchestrator.record.checked import append_record, record_line
from orchestrator.record.files import write_atomic


class JsonlTracker:
    """Appends points. A resumed trial first drops the points that it will measure again."""

    name = "JSONL"

    def __init__(self, paths: TrialPaths, resumed_step: int) -> None:
        kept = [point for point in read_metrics(paths) if point.step <= resumed_step]
        write_atomic(paths.metrics, "".join(f"{record_line(point)}\n" for point in kept))
        self._path = paths.metrics

    def log(self, point: MetricPoint) -> None:
        append_record(self._path, point)
