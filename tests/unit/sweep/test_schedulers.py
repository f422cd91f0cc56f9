"""What schedulers know, and still know after a resume."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from orchestrator.record import MetricPoint, SweepPaths
from orchestrator.spec import load_spec
from orchestrator.sweep.schedulers import make_scheduler

DEMO = "experiments/demo.yaml"


def scheduler(kind: str) -> TrialScheduler:
    made = make_scheduler(load_spec(DEMO, [f"scheduler.kind={kind}", "scheduler.min_trials=2"]))
    made.set_search_properties("eval/loss", "min")
    return made


class Trial(SimpleNamespace):
    """Hashable by name, as Tune's are."""

    def __hash__(self) -> int:
        return hash(self.trial_id)


@pytest.fixture
def make(tmp_path: Any) -> Callable[..., Trial]:
    """A trial, with the losses that its folder holds at steps 50, 100 ..."""

    def build(name: str, losses: Sequence[float] = (), finished: bool = False) -> Trial:
        paths = SweepPaths(tmp_path).trial(name)
        paths.root.mkdir(parents=True)
        points = [
            MetricPoint(step=50 * (i + 1), tokens=1, time_s=1, values={"eval/loss": loss})
            for i, loss in enumerate(losses)
        ]
        paths.metrics.write_text("".join(point.model_dump_json() + "\n" for point in points))
        storage = SimpleNamespace(experiment_fs_path=str(tmp_path / "tune"))
        return Trial(trial_id=name, is_finished=lambda: finished, storage=storage, status="RUNNING")

    return build


CONTROLLER = SimpleNamespace(get_live_trials=lambda: [])


def report(made: TrialScheduler, trial: Trial, step: int, loss: float) -> str:
    return str(made.on_trial_result(CONTROLLER, trial, {"step": step, "eval/loss": loss, "training_iteration": 1}))


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_what_lies_behind_is_stopped_after_a_resume_too(kind: str, make: Callable[..., Trial]) -> None:
    made = scheduler(kind)
    for name in ("a", "b", "c"):
        made.on_trial_add(CONTROLLER, make(name, [0.5, 0.4], finished=True))
    behind, ahead = make("behind"), make("ahead")
    for new in (behind, ahead):
        made.on_trial_add(CONTROLLER, new)
    assert report(made, ahead, 50, 0.1) == TrialScheduler.CONTINUE
    assert report(made, behind, 50, 3.0) == TrialScheduler.STOP


def test_without_a_memory_the_first_report_passes(make: Callable[..., Trial]) -> None:
    made = scheduler("asha")
    behind = make("behind")
    made.on_trial_add(CONTROLLER, behind)
    assert report(made, behind, 50, 3.0) == TrialScheduler.CONTINUE


def test_a_step_is_counted_once(make: Callable[..., Trial]) -> None:
    made = scheduler("median")
    first = make("first")
    made.on_trial_add(CONTROLLER, first)
    report(made, first, 50, 1.0)
    report(made, first, 50, 1.0)
    report(made, first, 100, 0.5)
    (results,) = made._inner._results.values()
    assert [result["step"] for result in results] == [50, 100]


def test_a_long_trial_is_never_cut_by_the_scheduler_alone(make: Callable[..., Trial]) -> None:
    made = scheduler("asha")
    long = make("long")
    made.on_trial_add(CONTROLLER, long)
    assert all(report(made, long, step, 1.0) == TrialScheduler.CONTINUE for step in (50, 100, 101, 10_000, 1_000_000))
