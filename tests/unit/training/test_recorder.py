"""What the recorder writes beside the metrics: steps made by now, and the number of steps once it is known."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import SweepPaths, TrialResult, TrialState
from orchestrator.record.checked import read_record
from orchestrator.spec import parse_spec
from orchestrator.training.attempt.events import Completed, Left, Logged, Noted, Stepped
from orchestrator.training.attempt.recorder import TrialRecorder

TIMES = (1.0, 0.0, 0.0)


@pytest.fixture
def recorder(document: dict[str, Any], tmp_path: Path) -> TrialRecorder:
    spec = parse_spec(document | {"tracking": {"tensorboard": False, "wandb": {"mode": "disabled"}}})
    paths = SweepPaths(tmp_path).trial("a")
    config = spec.trial_config({})
    start = TrialResult(trial_id="a", state=TrialState.RUNNING, config=config, metric="eval/loss", mode="min")
    return TrialRecorder(start, paths, spec)


def on_disk(recorder: TrialRecorder) -> TrialResult:
    return read_record(TrialResult, recorder._paths.progress)


def test_the_number_of_steps_is_on_disk_before_the_first_evaluation(recorder: TrialRecorder) -> None:
    assert on_disk(recorder).total_steps is None
    recorder.record(Noted(*TIMES, fields={"total_steps": 40}))
    assert on_disk(recorder).total_steps == 40


@pytest.mark.parametrize("end", [Left(*TIMES, step=5, lost=None), Completed(*TIMES)], ids=["left", "complete"])
def test_steps_made_by_now_are_in_a_file_until_the_attempt_ends(recorder: TrialRecorder, end: Any) -> None:
    file = recorder._paths.step
    recorder.record(Stepped(*TIMES, step=5))
    assert file.read_text() == "5\n"
    assert recorder.result.step == 0  # no part of the record
    recorder.record(end)
    assert not file.exists()


def test_the_last_training_loss_is_recorded(recorder: TrialRecorder) -> None:
    values = {"train/loss": 0.25, "train/grad_norm": 1.0, "train/learning_rate": 0.1}
    recorder.record(Logged(*TIMES, step=10, tokens=100, training_s=1.0, values=values))
    assert recorder.result.train_loss == 0.25
