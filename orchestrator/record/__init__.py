"""What a sweep leaves: one folder that is the truth."""

from orchestrator.record.models import BestPoint, MetricPoint, SweepInfo, TrialResult, TrialState
from orchestrator.record.paths import SweepPaths, TrialPaths
from orchestrator.record.sweep_record import (
    BestAdapter,
    SweepRecord,
    end_trial,
    open_sweep,
    read_metrics,
    read_result,
    read_trial,
    resumable,
    write_record,
)

__all__ = [
    "BestAdapter",
    "BestPoint",
    "MetricPoint",
    "SweepInfo",
    "SweepPaths",
    "SweepRecord",
    "TrialPaths",
    "TrialResult",
    "TrialState",
    "end_trial",
    "open_sweep",
    "read_metrics",
    "read_result",
    "read_trial",
    "resumable",
    "write_record",
]
