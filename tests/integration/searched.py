"""Run small sweeps with a search, and read what was decided from their records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import DEMO, TINY

from orchestrator.record import Decision, SweepPaths, SweepRecord, TrialResult, read_decisions, read_metrics
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.sweep import run_sweep
from orchestrator.sweep.search.factory import make_searcher

# One worker, whose trials train together on a few rows.
PACKED = [
    *TINY, "data.max_rows=100", "data.held_out={count: 20}", "training.schedule=constant", "training.eval_steps=2",
    "training.save_steps=null", "training.steps=8", "search.tied={}", "resources.cpus_per_trial=2",
    "resources.trials_per_gpu=3",
]  # fmt: skip
ONE_AT_A_TIME = ["resources={max_concurrent: 1, trials_per_gpu: 1, cpus_per_trial: 1}"]
TWO_AXES = (
    "search.space={training.learning_rate: {loguniform: [1e-5, 1e-2]}, training.weight_decay: {uniform: [0.0, 0.5]}}"
)
RATE = "search.space={training.learning_rate: {loguniform: [1e-5, 1e-2]}}"


def sweep(folder: Path, *overrides: str, say: Callable[[str], None] = lambda _: None) -> SweepRecord:
    return run_sweep(load_spec(DEMO, [*PACKED, *overrides]), SweepPaths(folder / "sweep"), lambda _: None, say=say)


def losses(record: SweepRecord, trial: TrialResult) -> dict[int, float]:
    """Return recorded step -> loss, and check that each step is recorded once and in order."""
    points = [p for p in read_metrics(record.paths.trial(trial.trial_id)) if "eval/loss" in p.values]
    steps = [point.step for point in points]
    assert steps == sorted(set(steps)), f"{trial.trial_id} recorded {steps}"
    return {point.step: point.values["eval/loss"] for point in points}


def decided(record: SweepRecord, *actions: str) -> list[Decision]:
    return [each for each in read_decisions(record.paths) if each.action in actions]


def by_age(record: SweepRecord) -> list[TrialResult]:
    """Return the trials, the oldest first."""
    trials = {trial.trial_id: trial for trial in record.trials()}
    return [trials[name] for name in record.paths.trial_ids()]


def replayed(spec: SweepSpec, values: list[float]) -> list[dict[str, Any]]:
    """Return the points of a new search whose trials report these losses."""
    searcher, points = make_searcher(spec, max_concurrent=1), []
    for i, value in enumerate(values):
        points.append(searcher.suggest(f"trial-{i}"))
        searcher.on_trial_complete(f"trial-{i}", {"eval/loss": value})
    return points
