"""A sweep gives the same results if its trials train together, one after another, or with trl."""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import ray
from tiny import DEMO, TINY

from orchestrator.cluster import connection
from orchestrator.record import SweepPaths, SweepRecord, TrialResult, TrialState, read_metrics
from orchestrator.spec import load_spec
from orchestrator.sweep import run_sweep
from orchestrator.sweep.workers import trainable
from orchestrator.sweep.workers.trainable import TrialTrainable

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

LOSS = 5e-5
"""Relative tolerance of a loss: past their best, float32 runs at 2e-3 differ by up to 1e-5 after 16 steps."""

COMMON = [
    *TINY, "search.tied={lora.alpha: 2 * lora.rank}", "search.algorithm=grid", "search.num_trials=null",
    "training.steps=16",
]  # fmt: skip

FORMS = {
    "packed": ["training.engine=fast", "resources.trials_per_gpu=4"],
    "solo": ["training.engine=fast", "resources.trials_per_gpu=1"],
    "trl": ["training.engine=trl", "resources.trials_per_gpu=1"],
}


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """Start Ray once for all sweeps here."""
    with connection(None):
        yield


@pytest.fixture
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SweepRecord]:
    """Return a function: `sweep("packed", ...)` runs a sweep in one of the `FORMS`, with overrides."""

    def start(form: str, *overrides: str) -> SweepRecord:
        spec = load_spec(DEMO, [*COMMON, *FORMS[form], *overrides])
        return run_sweep(spec, SweepPaths(tmp_path_factory.mktemp("runs") / form), lambda _: None)

    return start


def test_packed_solo_and_trl_give_the_same_ranking_and_values(sweep: Callable[..., SweepRecord]) -> None:
    """There are four training rows, so that the largest adapter at the higher rate overfits before the end."""
    grid = [
        "search.space={lora.rank: {grid: [4, 16]}, training.learning_rate: {grid: [3e-4, 2e-3]}}", "lora.dropout=0",
        "data.max_rows=24", "data.held_out={count: 20}", "training.batch_size=4", "training.schedule=constant",
        "scheduler.kind=none",
    ]  # fmt: skip
    records = {form: sweep(form, *grid) for form in FORMS}
    packed, solo, trl = records.values()
    assert shares_a_worker(packed)
    assert not shares_a_worker(solo)
    assert {form: engines(record) for form, record in records.items()} == {
        "packed": {"fast"}, "solo": {"fast"}, "trl": {"trl"},
    }  # fmt: skip
    expected = trl.trials()
    assert [trial.state for trial in expected] == [TrialState.COMPLETE] * 4
    assert len({best_step(trial) for trial in expected}) > 1, "some trial was better before its end"
    for better, worse in pairwise(expected):
        assert best_loss(worse) > (1 + 100 * LOSS) * best_loss(better), "losses by chance so near rank nothing"
    for record in (packed, solo):
        for trial, wanted in zip(record.trials(), expected, strict=True):
            assert trial.config.varied == wanted.config.varied, "another ranking"
            assert (trial.state, trial.step, trial.tokens) == (wanted.state, wanted.step, wanted.tokens)
            assert best_step(trial) == best_step(wanted)
            assert_same_values(record, trial, trl, wanted)


class AfterPreviousTrial(TrialTrainable):
    """Reports nothing before the previous trial has ended. Its worker trains on meanwhile."""

    def step(self) -> dict[str, object]:
        report: dict[str, object] = super().step()
        sweep, _, number = self.trial_id.rpartition("_")
        before = self._sweep.paths.trial(f"{sweep}_{int(number) - 1:05d}")
        while int(number) and not before.result.is_file():
            time.sleep(0.05)
        return report


def test_asha_stops_the_same_trials_at_the_same_rungs(
    sweep: Callable[..., SweepRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports arrive in the same order, in two real sweeps.

    Solo, one trial runs at a time: all reports of a trial come before the next one's. Packed, all train together, and
    each trainable holds its reports until the previous trial has ended. Scheduler, Tune and workers are unchanged.
    """
    # At 4 and 8 steps: the first passes, the second is the worst, the third is in between, the fourth is the best.
    asha = [
        "search.space={training.learning_rate: {grid: [1e-3, 1e-5, 7e-4, 2e-3]}}", "lora.dropout=0.1",
        "scheduler={kind: asha, grace_steps: 4, reduction_factor: 2}",
    ]  # fmt: skip
    solo = sweep("solo", *asha, "resources.max_concurrent=1")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(trainable, "TrialTrainable", AfterPreviousTrial)
    packed = sweep("packed", *asha)
    assert shares_a_worker(packed)
    assert not shares_a_worker(solo)
    expected = {trial.config.varied["training.learning_rate"]: trial for trial in solo.trials()}
    assert {rate: (trial.state, trial.step) for rate, trial in expected.items()} == {
        1e-3: (TrialState.COMPLETE, 16),
        1e-5: (TrialState.STOPPED, 4),
        7e-4: (TrialState.STOPPED, 8),
        2e-3: (TrialState.COMPLETE, 16),
    }
    for trial in packed.trials():
        wanted = expected[trial.config.varied["training.learning_rate"]]
        assert (trial.state, trial.step, trial.tokens) == (wanted.state, wanted.step, wanted.tokens)
        assert trial.state == TrialState.COMPLETE or trial.extra_steps, "it continued beside the others"
        assert_same_values(packed, trial, solo, wanted)


def shares_a_worker(record: SweepRecord) -> bool:
    """Return whether all trials had slots of one worker before the first one ended, and none had to train alone."""
    trials = record.trials()
    paths = [record.paths.trial(trial.trial_id) for trial in trials]
    is_one = len({trial.worker for trial in trials}) == 1 and {trial.not_packed_reason for trial in trials} == {None}
    return is_one and max(modified(each.config) for each in paths) < min(modified(each.result) for each in paths)


def modified(path: Path) -> float:
    return path.stat().st_mtime


def engines(record: SweepRecord) -> set[str | None]:
    return {trial.engine for trial in record.trials()}


def best_step(trial: TrialResult) -> int:
    assert trial.best is not None
    return trial.best.step


def best_loss(trial: TrialResult) -> float:
    assert trial.best is not None
    return trial.best.value


def assert_same_values(record: SweepRecord, trial: TrialResult, other: SweepRecord, wanted: TrialResult) -> None:
    """Compare all recorded losses, in training and evaluation, at the same steps; gradient norms less strictly."""
    for name, bound in (("eval/loss", LOSS), ("train/loss", LOSS), ("train/grad_norm", 1e-3)):
        found, expected = column(record, trial, name), column(other, wanted, name)
        assert expected
        assert found == pytest.approx(expected, rel=bound), f"{name} of {trial.config.varied}"


def column(record: SweepRecord, trial: TrialResult, name: str) -> dict[int, float]:
    """Return step -> value."""
    points = read_metrics(record.paths.trial(trial.trial_id))
    return {point.step: point.values[name] for point in points if name in point.values}
