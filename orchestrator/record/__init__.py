"""The records of a sweep: one folder on disk, which every view of the sweep is read from.

Reading order: `models` (what is recorded), `paths` (where), `sweep_record` (read it back), `new_sweep` (claim the
folder of a new sweep), `extend` (add trials or budget to a sweep), `decisions` (the scheduler's log), `budget` and
`search_ended` (what ended the search before its last trial), `test_score` (the winner on test rows), `answers` (base
and winner side by side). `files` writes atomically, `checked` adds a checksum to each record, `checkpoints` verifies
checkpoints, `damage` finds and repairs damaged records, `absent` says which adapters were
removed, `lock` keeps a second driver out and tells whether one runs.
`requests` holds what people ask of a running sweep, `ask` waits for the driver's answer, `find_trial` finds the trial.
`present` reads a sweep while it runs, `standing` sums it up.
"""

from orchestrator.record.answers import AnsweredPrompt, Answers
from orchestrator.record.budget import BudgetSpent
from orchestrator.record.checked import DamagedError, write_record
from orchestrator.record.checkpoints import resumable, start_of
from orchestrator.record.damage import Damage, find_damage, repair
from orchestrator.record.decisions import Decision, read_decisions
from orchestrator.record.models import (
    AddedTrial,
    BadRows,
    BestPoint,
    ExperimentSource,
    ExploitCheckpoint,
    MetricPoint,
    RowScores,
    SourceRows,
    SweepInfo,
    TrialResult,
    TrialState,
)
from orchestrator.record.paths import SweepPaths, TrialPaths
from orchestrator.record.present import PresentTrials
from orchestrator.record.search_ended import SearchEnded
from orchestrator.record.standing import (
    have_ended,
    have_repeats_ended,
    is_finished,
    planned_trials,
    repeats_record,
    totals,
)
from orchestrator.record.sweep_record import (
    OPEN,
    SweepRecord,
    end_trial,
    read_added,
    read_exploit_checkpoint,
    read_metrics,
    read_result,
    read_sweep,
    read_trial,
    read_trials,
    write_info,
)
from orchestrator.record.test_score import TestScore

__all__ = [
    "OPEN",
    "AddedTrial",
    "AnsweredPrompt",
    "Answers",
    "BadRows",
    "BestPoint",
    "BudgetSpent",
    "Damage",
    "DamagedError",
    "Decision",
    "ExperimentSource",
    "ExploitCheckpoint",
    "MetricPoint",
    "PresentTrials",
    "RowScores",
    "SearchEnded",
    "SourceRows",
    "SweepInfo",
    "SweepPaths",
    "SweepRecord",
    "TestScore",
    "TrialPaths",
    "TrialResult",
    "TrialState",
    "end_trial",
    "find_damage",
    "have_ended",
    "have_repeats_ended",
    "is_finished",
    "planned_trials",
    "read_added",
    "read_decisions",
    "read_exploit_checkpoint",
    "read_metrics",
    "read_result",
    "read_sweep",
    "read_trial",
    "read_trials",
    "repair",
    "repeats_record",
    "resumable",
    "start_of",
    "totals",
    "write_info",
    "write_record",
]
