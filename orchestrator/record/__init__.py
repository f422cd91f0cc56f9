"""What a sweep leaves: one folder that is the truth."""

from orchestrator.record.budget import BudgetSpent
from orchestrator.record.decisions import Decision, read_decisions
from orchestrator.record.models import (
    BadRows,
    BestPoint,
    ExperimentSource,
    MetricPoint,
    RowScores,
    SourceRows,
    SweepInfo,
    TrialResult,
    TrialState,
)
from orchestrator.record.paths import SweepPaths, TrialPaths
from orchestrator.record.sweep_record import (
    OPEN,
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
    "OPEN",
    "BadRows",
    "BestPoint",
    "BudgetSpent",
    "Decision",
    "ExperimentSource",
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
    "read_decisions",
    "read_metrics",
    "read_result",
    "read_sweep",
    "read_trial",
    "resumable",
    "write_record",
]
