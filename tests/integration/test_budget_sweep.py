"""Budgets of hours in real sweeps: the sweeps end, the records say why, and the best trial is available."""

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from searched import RATE, decided, losses, sweep

from orchestrator.cluster import connection
from orchestrator.deploy import FinishedSweep
from orchestrator.record import SweepRecord, TrialState
from orchestrator.sweep.schedulers import budget

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

# Far more than is allowed: whoever ends was ended.
LONG = ["search.num_trials=6", RATE, "scheduler.kind=none", "training.steps=2000"]


@pytest.fixture(scope="module", autouse=True)
def ray_with_a_gpu() -> Iterator[None]:
    """Start Ray once for all sweeps here, with one GPU declared; without a real one, workers train on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(ray, "init", functools.partial(ray.init, num_gpus=1, num_cpus=2))
        with connection(None):
            yield


def assert_ended_by_budget(record: SweepRecord, limit: str, said: list[str]) -> None:
    over, trials = record.budget_spent(), record.trials()
    assert over is not None
    assert over.limit == limit
    assert over.spent >= over.allowed
    assert 1 <= len(trials) < 6, "no more were begun"
    for trial in trials:
        assert (trial.state, trial.stopped) == (TrialState.STOPPED, str(over))
        assert trial.step == max(losses(record, trial)) < 2000
        assert not record.paths.trial(trial.trial_id).lease.exists()
    assert {each.trial_id: each.why for each in decided(record, "stopped")} == {t.trial_id: str(over) for t in trials}
    assert said[-1] == f"{over}: {len(trials)} of 6 trials begun"
    best = FinishedSweep(record).best().trial
    assert best.best is not None
    assert best.best.value == min(min(losses(record, trial).values()) for trial in trials)
    assert record.adapter(best).is_dir()


def test_gpu_hours(tmp_path: Path) -> None:
    said: list[str] = []
    record = sweep(
        tmp_path, *LONG, "resources={trials_per_gpu: 2}", f"search.budget.gpu_hours={1 / 3600}", say=said.append
    )
    assert_ended_by_budget(record, "gpu_hours", said)
    over = record.budget_spent()
    assert over is not None
    trained = sum(trial.gpu_seconds for trial in record.trials())
    assert 1 <= over.spent * 3600 <= trained + 0.01, "the trials' own GPU-seconds, each of two that share has half"


def test_wall_clock_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is advanced by an hour after a few evaluations: a slow machine has none in a few seconds."""
    said: list[str] = []
    folder = tmp_path / "sweep" / "trials"

    def clock() -> float:
        points = [line for file in folder.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
        return time.monotonic() + 3600 * (sum("eval/loss" in line for line in points) >= 4)

    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=clock))
    resources = "resources={trials_per_gpu: 2, cpus_per_trial: 1}"
    record = sweep(tmp_path, *LONG, resources, "search.budget.wall_clock_hours=0.9", say=said.append)
    assert_ended_by_budget(record, "wall_clock_hours", said)
    over = record.budget_spent()
    assert over is not None
    assert over.spent == pytest.approx(1, abs=0.1)
