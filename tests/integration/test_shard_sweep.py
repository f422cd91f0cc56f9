"""A sweep whose workers hold one base in pieces: the same results as whole bases, and nothing lost with a worker."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.record import SweepPaths, SweepRecord, TrialState, read_metrics
from orchestrator.spec import SweepSpec
from orchestrator.sweep import run
from orchestrator.sweep.workers import fleet
from orchestrator.sweep.workers.fleet import FleetPlan

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

Tiny = Callable[..., SweepSpec]
RATES = [3e-3, 1e-3, 2e-4, 1e-5]
GRID = [
    "search={algorithm: grid}", f"search.space.training.learning_rate={{grid: {RATES}}}", "scheduler.kind=none",
    "training.engine=fast", "base.compute_dtype=float32", "evaluation.metrics=[exact_match]",
]  # fmt: skip


def sweep(spec: SweepSpec, folder: SweepPaths, num_shards: int, monkeypatch: pytest.MonkeyPatch) -> SweepRecord:
    """Run a sweep on two CPU workers with two slots each, which hold two whole bases, or one in two pieces."""
    plan = FleetPlan(2, 0, 1, 2, True, "", num_shards)
    monkeypatch.setattr(fleet, "plan_fleet", lambda *_: plan)
    return run.run_sweep(spec, folder, lambda _: None)


def losses(record: SweepRecord) -> dict[float, list[tuple[int, float]]]:
    """Return learning rate -> step and loss of each evaluation."""
    found = {}
    for result in record.trials():
        assert result.state == TrialState.COMPLETE, result.error
        assert result.engine == "fast"
        points = read_metrics(record.paths.trial(result.trial_id))
        losses = [(point.step, point.values["eval/loss"]) for point in points if "eval/loss" in point.values]
        found[result.config.training.learning_rate] = losses
    return found


def kill_one(folder: SweepPaths, killed: list[int]) -> None:
    """Kill a worker of a sweep once a trial has a checkpoint. The names of the workers' logs end with their ids."""
    while not list(folder.root.glob("trials/*/checkpoints/checkpoint-*")):
        time.sleep(0.05)
    killed.append(int(min(folder.workers.glob("*.log")).stem.rpartition("-")[2]))
    os.kill(killed[0], signal.SIGKILL)


def test_trials_on_a_base_in_pieces_are_those_on_a_whole_one_even_if_a_worker_dies(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny(*GRID)
    whole = losses(sweep(spec, SweepPaths(tmp_path / "whole"), 1, monkeypatch))
    assert sorted(whole) == sorted(RATES)
    assert losses(sweep(spec, SweepPaths(tmp_path / "pieces"), 2, monkeypatch)) == whole

    folder, killed = SweepPaths(tmp_path / "killed"), list[int]()
    killer = threading.Thread(target=kill_one, args=(folder, killed), daemon=True)
    killer.start()
    record = sweep(spec, folder, 2, monkeypatch)
    assert losses(record) == whole
    assert killed
    logs = [log.read_text() for log in folder.workers.glob("*.log")]
    assert len(logs) == 4, "both workers have started again, because neither can gather without the other"
    assert any("resources.strategy shard: another process of the group is gone" in log for log in logs)
