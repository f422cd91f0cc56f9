"""A trial's record says when its first attempt began and when it ended for good."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orchestrator.record import SweepPaths, TrialResult, TrialState, read_trial
from orchestrator.record.sweep_record import end_trial, read_sweep
from orchestrator.spec import parse_spec
from orchestrator.training.attempt.recorder import TrialRecorder


def test_start_is_that_of_the_first_attempt_and_end_that_of_the_last(
    document: dict[str, Any], make_sweep: Any, tmp_path: Path
) -> None:
    spec = parse_spec(document | {"tracking": {"tensorboard": False, "wandb": {"mode": "disabled"}}})
    paths: SweepPaths = make_sweep(tmp_path / "s", {})
    trial = paths.trial("a")
    start = TrialResult(
        trial_id="a", state=TrialState.RUNNING, config=spec.trial_config({}), metric="eval/loss", mode="min"
    )
    TrialRecorder(start, trial, spec)
    info = read_sweep(paths.root).info
    first = read_trial(trial, info)
    assert first.started is not None
    assert first.ended is None
    assert abs(datetime.fromisoformat(first.started) - datetime.now(UTC)) < timedelta(minutes=1)
    earlier = first.model_copy(update={"started": "2026-01-01T00:00:00.000+00:00"})
    again = TrialRecorder(earlier, trial, spec).result
    assert again.started == earlier.started
    ended = end_trial(trial, again.model_copy(update={"state": TrialState.STOPPED}))
    assert ended.ended is not None
    assert datetime.fromisoformat(ended.ended) >= datetime.fromisoformat(first.started)
    assert read_trial(trial, info) == ended
