"""Trials that train together in workers: none is lost and no slot leaks, whichever process dies."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.record import SweepPaths, SweepRecord, TrialResult, TrialState, read_metrics, read_sweep, read_trial
from orchestrator.spec import SweepSpec
from orchestrator.sweep import results, run
from orchestrator.sweep.results import ResultKeeper
from orchestrator.sweep.schedulers.factory import make_scheduler
from orchestrator.sweep.schedulers.report_order import ReportOrder
from orchestrator.sweep.workers import fleet
from orchestrator.sweep.workers.worker import Worker

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

Tiny = Callable[..., SweepSpec]
RATES = [3e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 1e-6]
GRID = ["search={algorithm: grid}", f"search.space.training.learning_rate={{grid: {RATES}}}", "scheduler.kind=none"]
FOUR = ["resources.max_concurrent=4", "resources.trials_per_gpu=2"]
"""Trials at a time, in one or two workers."""


class Witness:
    """Records what Tune and the driver see, in this process."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.reports: list[tuple[str, int, int]] = []
        """Trial, step and process id of the trainable, for each report."""
        self.modules: set[str] = set()
        """Heavy libraries that a trainable has imported."""
        self.most_at_once = 0
        self.free: list[int | None] = []
        """Slots of each worker that are free at the end of the sweep."""
        self.on_report: Callable[[str, int, int], None] | None = None

    def run(self, spec: SweepSpec, folder: SweepPaths) -> SweepRecord:
        return run.run_sweep(spec, folder, lambda _: None, say=self.said.append)


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    import ray

    found = Witness()

    class Keeper(ResultKeeper):
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            found.reports.append((trial.trial_id, result["step"], result["pid"]))
            found.most_at_once = max(found.most_at_once, sum(each.status == "RUNNING" for each in trials))
            trainable = trial.temporary_state.ray_actor
            if trainable is not None:  # it is paused
                found.modules |= ray.get(trainable.__ray_call__.remote(heavy_modules))
            if found.on_report:
                found.on_report(trial.trial_id, result["step"], result["pid"])

    def end(self: fleet.Fleet) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            found.free = ray.get([handle.free_slots.remote() for handle in self._handles])
            if sum(slots or 0 for slots in found.free) == self._plan.slots * len(self._handles):
                break
            time.sleep(0.2)
        ends(self)

    ends = fleet.Fleet.end
    monkeypatch.setattr(results, "ResultKeeper", Keeper)
    monkeypatch.setattr(fleet.Fleet, "end", end)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return found


def heavy_modules(_: Any) -> set[str]:
    """Return the heavy libraries that are imported. Runs in the process of a trainable."""
    return {"torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "optuna"} & set(sys.modules)


def evaluations(record: SweepRecord, trial: TrialResult) -> dict[int, float]:
    """Return recorded step -> loss, and check that each step is recorded once and in order."""
    points = [p for p in read_metrics(record.paths.trial(trial.trial_id)) if "eval/loss" in p.values]
    steps = [point.step for point in points]
    assert steps == sorted(set(steps)), f"{trial.trial_id} recorded {steps}"
    return {point.step: point.values["eval/loss"] for point in points}


def assert_all_complete(record: SweepRecord, number: int, steps: int) -> None:
    trials = record.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * number
    for trial in trials:
        assert list(evaluations(record, trial)) == list(range(4, steps + 1, 4))
        logged = [p.step for p in read_metrics(record.paths.trial(trial.trial_id)) if "train/loss" in p.values]
        assert logged == list(range(2, steps + 1, 2))
        assert not record.paths.trial(trial.trial_id).lease.exists()


def test_asha_stops_by_the_recorded_values_and_no_slot_leaks(witness: Witness, tiny: Tiny, folder: SweepPaths) -> None:
    spec = tiny(*GRID, "scheduler.kind=asha", "training.steps=16", *FOUR)
    record = witness.run(spec, folder)
    trials = record.trials()
    assert len(trials) == 8
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.STOPPED}
    assert witness.said == [witness.said[0]]
    assert "lets 4 of 8 trials run at a time" in witness.said[0]
    assert witness.most_at_once <= 4
    assert sum(slots or 0 for slots in witness.free) == 4, "a slot is still held"
    # If several trials stop in one iteration, Tune keeps as many trainables as trials are staged and ends the others.
    assert len({trainable for _, _, trainable in witness.reports}) <= 6, "trainables are reused"
    assert witness.modules == set(), "a trainable imports no heavy library"
    for trial in trials:
        losses, paths = evaluations(record, trial), record.paths.trial(trial.trial_id)
        assert trial.step == max(losses), "the record ends at the last evaluation that was reported"
        reported = {step for name, step, _ in witness.reports if name == trial.trial_id}
        assert set(losses) - {16} == reported - {16}
        assert not paths.checkpoints.exists()
        assert [folder.name for folder in (paths.root / "adapters").iterdir()] == [f"step-{trial.best.step}"]  # type: ignore[union-attr]
    stopped = {trial.trial_id: trial.step for trial in trials if trial.state == TrialState.STOPPED}
    assert stopped == replayed(spec, record, witness.reports), "the same reports in the same order stop the same trials"


def replayed(spec: SweepSpec, record: SweepRecord, reports: list[tuple[str, int, int]]) -> dict[str, int]:
    """Return trial -> step for the trials that the scheduler stops, by the recorded values in order of reports."""
    scheduler = make_scheduler(spec, record.info.num_rows)
    scheduler.set_search_properties("eval/loss", "min")
    losses = {trial.trial_id: evaluations(record, trial) for trial in record.trials()}
    configs = {trial.trial_id: trial.config.varied for trial in record.trials()}
    order, stopped, steps = ReportOrder(4, len(losses)), {}, dict[str, int]()
    for name in sorted(losses):
        order.add(name)

    def process(names: list[str]) -> None:
        heard = []
        for name in names:
            step = steps[name]
            trial = TrialStub(trial_id=name, config=configs[name])
            result = {"step": step, "eval/loss": losses[name][step]}
            if step == spec.training.steps:
                scheduler.on_trial_complete(None, trial, result | {"eval/loss": min(losses[name].values())})
                order.end(name)
            else:
                heard.append((trial, result))
        stops = scheduler.judge(heard)
        for trial, result in heard:
            if trial.trial_id in stops:
                stopped[trial.trial_id] = result["step"]
                order.end(trial.trial_id)
            else:
                order.processed(trial.trial_id)

    for name, step, _ in reports:
        steps[name] = step
        order.report(name, step, 0.0)
        while due := order.next(0.0):
            process(due)
    return stopped


class TrialStub(SimpleNamespace):
    """The attributes of a trial that a scheduler reads."""

    def __hash__(self) -> int:
        return hash(self.trial_id)


def test_a_trainable_is_killed(witness: Witness, tiny: Tiny, folder: SweepPaths) -> None:
    killed: list[tuple[str, int]] = []

    def kill(trial: str, step: int, trainable: int) -> None:
        if step == 8 and not killed:
            killed.append((trial, trainable))
            os.kill(trainable, signal.SIGKILL)

    witness.on_report = kill
    spec = tiny(*GRID, "training.steps=16", *FOUR)
    record = witness.run(spec, folder)
    ((name, trainable),) = killed
    assert_all_complete(record, 8, 16)
    assert len({pid for trial, _, pid in witness.reports if trial == name}) == 2, "another trainable continued"
    assert trainable not in [pid for trial, step, pid in witness.reports if trial == name and step > 8]
    assert sum(slots or 0 for slots in witness.free) == 4, "the slot of the dead trainable is still held"


def test_a_worker_is_killed_with_eight_trials(witness: Witness, tiny: Tiny, folder: SweepPaths) -> None:
    workers: list[str] = []
    reached: set[str] = set()

    def kill(trial: str, *_: int) -> None:
        reached.add(trial)
        if len(reached) == 8 and not workers:
            worker = read_trial(folder.trial(trial), read_sweep(folder.root).info).worker
            assert worker is not None
            workers.append(worker)
            os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)

    witness.on_report = kill
    spec = tiny(
        *GRID, "training.steps=16", "resources.cpus_per_trial=2", "resources.trials_per_gpu=8", "training.save_steps=4"
    )
    record = witness.run(spec, folder)
    assert workers
    assert_all_complete(record, 8, 16)
    assert workers[0] not in {trial.worker for trial in record.trials()}
    assert sum(slots or 0 for slots in witness.free) == 8


class SlowWorker(Worker):
    """A worker that takes three seconds for each release."""

    def release(self, lease: str) -> None:
        time.sleep(3)
        super().release(lease)


def test_a_release_that_takes_three_seconds_leaks_nothing(
    witness: Witness, tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "Worker", SlowWorker)
    asha = ["scheduler.kind=asha", "scheduler.reduction_factor=2"]
    spec = tiny(*GRID, *asha, "training.steps=40", "resources.max_concurrent=2")
    record = witness.run(spec, folder)
    trials = record.trials()
    stopped = [trial for trial in trials if trial.state == TrialState.STOPPED]
    assert len(trials) == 8
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.STOPPED}
    assert sum(slots or 0 for slots in witness.free) == 2
    assert any(trial.extra_steps for trial in stopped), "the worker continues while it is being released"
    for trial in stopped:
        assert trial.step in (4, 8, 16, 32)
        assert max(evaluations(record, trial)) == trial.step
        assert not record.paths.trial(trial.trial_id).checkpoints.exists()
