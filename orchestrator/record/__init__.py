"""What a sweep leaves: one folder that is the truth."""

from orchestrator.record.models import (
    BestPoint,
    MetricPoint,
    RowScores,
    SourceRows,
    SweepInfo,
    TrialResult,
    TrialState,
)
from orchestrator.record.paths import SweepPaths, TrialPaths
from orchestrator.record.sweep_record import (
    SweepRecord,
    end_trial,
    read_metrics,
    read_result,
    read_sweep,
    read_trial,
    resumable,
    write_record,
)

__all__ = [
    "BestPoint",
    "MetricPoint",
    "RowScores",
    "SourceRows",
    "SweepInfo",
    "SweepPaths",
    "SweepRecord",
    "TrialPaths",
    "TrialResult",
    "TrialState",
    "end_trial",
    "read_metrics",
    "read_result",
    "read_sweep",
    "read_trial",
    "resumable",
    "write_record",
]
