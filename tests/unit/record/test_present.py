"""What views see of a sweep while it runs."""

from pathlib import Path

import pytest

from orchestrator.record import MetricPoint, PresentTrials, SweepPaths, read_result, read_sweep, write_record
from orchestrator.record import present as module
from tests.unit.conftest import MakeSweep


@pytest.fixture
def paths(tmp_path: Path, make_sweep: MakeSweep) -> SweepPaths:
    return make_sweep(tmp_path / "s", {"a": ("RUNNING", 0.5), "b": ("COMPLETE", 0.7)})


def write_points(paths: SweepPaths, *steps: int, rest: str = "") -> None:
    points = [MetricPoint(step=step, tokens=10 * step, time_s=step, values={"train/loss": 1 / step}) for step in steps]
    text = "".join(point.model_dump_json() + "\n" for point in points)
    paths.trial("a").metrics.write_text(text + rest)


def step_of(present: PresentTrials) -> int:
    return next(trial.step for trial in present.read() if trial.trial_id == "a")


def test_a_running_trial_has_the_step_of_its_last_complete_point(paths: SweepPaths) -> None:
    present = PresentTrials(read_sweep(paths.root))
    assert step_of(present) == 0
    write_points(paths, *range(1, 400), rest='{"step": 400, "tok')  # a crash has cut the last line short
    first = present.read()[0]
    assert (first.step, first.tokens, first.train_loss) == (399, 3990, 1 / 399)
    assert read_sweep(paths.root).trials()[0].step == 0  # the record is unchanged


def test_steps_between_two_points_are_seen(paths: SweepPaths) -> None:
    present = PresentTrials(read_sweep(paths.root))
    write_points(paths, 10)
    paths.trial("a").step.write_text("13\n")
    assert step_of(present) == 13
    paths.trial("a").step.write_text("")  # is being written
    assert step_of(present) == 10
    write_points(paths, 10, 20)
    paths.trial("a").step.write_text("13\n")  # older than the last point
    assert step_of(present) == 20


def test_a_trial_that_has_ended_is_read_once(paths: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = module.read_trial
    monkeypatch.setattr(module, "read_trial", lambda trial, info: reads.append(trial.trial_id) or real(trial, info))
    present = PresentTrials(read_sweep(paths.root))
    for _ in range(3):
        present.read()
    assert reads.count("b") == 1
    result = paths.trial("b").result
    write_record(result, read_result(paths.trial("b")).model_copy(update={"step": 9}))
    assert [trial.step for trial in present.read() if trial.trial_id == "b"] == [9]
