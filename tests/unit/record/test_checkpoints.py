from pathlib import Path

import pytest

from orchestrator.record import BestPoint, MetricPoint, TrialPaths, TrialResult, TrialState, start_of, write_record
from orchestrator.record.checked import append_record
from orchestrator.record.checkpoints import resumable, seal_checkpoint
from orchestrator.record.manifest import folder_fault, seal_folder
from orchestrator.spec import TrialConfig


@pytest.fixture
def paths(tmp_path: Path, config: TrialConfig) -> TrialPaths:
    """A trial with checkpoints of steps 2 and 4, and the best adapter at step 2."""
    paths = TrialPaths(tmp_path / "sweep", "a")
    paths.adapter(2).mkdir(parents=True)
    (paths.adapter(2) / "weights").write_text("adapter")
    seal_folder(paths.adapter(2))
    for step in (2, 4):
        folder = paths.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("optimizer.pt", "trainer_state.json"):
            (folder / name).write_text(f"{name} of step {step}")
        seal_checkpoint(folder)
        append_record(paths.metrics, MetricPoint(step=step, tokens=10 * step, time_s=1.0, values={"eval/loss": 0.5}))
    best = BestPoint(value=0.5, step=2, values={"eval/loss": 0.5}, adapter="adapters/step-2")
    progress = new_trial(config).model_copy(
        update={"step": 4, "tokens": 40, "best": best, "checkpoint": "checkpoints/checkpoint-4"}
    )
    write_record(paths.progress, progress)
    return paths


@pytest.fixture
def config() -> TrialConfig:
    return TrialConfig.model_validate(
        {"base": {"model": "embedded"}, "data": {"source": "rows.jsonl", "format": "text", "held_out": {"count": 1}}}
    )


def new_trial(config: TrialConfig) -> TrialResult:
    return TrialResult(trial_id="a", state=TrialState.RUNNING, config=config, metric="eval/loss", mode="min")


def test_a_trial_continues_from_its_newest_checkpoint(paths: TrialPaths, config: TrialConfig) -> None:
    start = start_of(paths, new_trial(config))
    assert (start.step, start.tokens, start.warnings) == (4, 40, [])


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "manifest.json"])
def test_a_checkpoint_without_a_file_is_passed_over(paths: TrialPaths, config: TrialConfig, name: str) -> None:
    (paths.checkpoints / "checkpoint-4" / name).unlink()
    start = start_of(paths, new_trial(config))
    assert (start.step, start.tokens, start.checkpoint) == (2, 20, "checkpoints/checkpoint-2")
    (warning,) = start.warnings
    assert name in warning
    assert warning.endswith("; continued from checkpoint-2")


def test_without_a_whole_checkpoint_a_trial_begins_anew(paths: TrialPaths, config: TrialConfig) -> None:
    for step in (2, 4):
        (paths.checkpoints / f"checkpoint-{step}" / "optimizer.pt").write_text("damaged")
    start = start_of(paths, new_trial(config))
    assert (start.step, start.checkpoint, start.best) == (0, None, None)
    assert len(start.warnings) == 2
    assert all(warning.endswith("; began anew") for warning in start.warnings)
    assert resumable(paths, config) is None


def test_a_checkpoint_whose_points_are_lost_is_passed_over(paths: TrialPaths, config: TrialConfig) -> None:
    first, _ = paths.metrics.read_text().splitlines()
    paths.metrics.write_text(f"{first}\n")
    start = start_of(paths, new_trial(config))
    assert start.step == 2
    assert "metrics.jsonl has lost points up to this step" in start.warnings[0]


def test_a_step_whose_last_point_is_cut_is_made_again(paths: TrialPaths, config: TrialConfig) -> None:
    append_record(paths.metrics, MetricPoint(step=4, tokens=40, time_s=1.0, values={"eval/loss": 0.4}))
    paths.metrics.write_bytes(paths.metrics.read_bytes()[:-9])
    assert start_of(paths, new_trial(config)).step == 2


def test_a_damaged_best_adapter_is_trained_again(paths: TrialPaths, config: TrialConfig) -> None:
    (paths.adapter(2) / "weights").write_text("damaged")
    assert start_of(paths, new_trial(config)).step == 0
    progress = start_of(paths, new_trial(config))
    assert "the best adapter of an earlier step" in progress.warnings[0]


def test_a_sealed_folder_names_what_differs(paths: TrialPaths) -> None:
    folder = paths.checkpoints / "checkpoint-4"
    assert folder_fault(folder) is None
    (folder / "optimizer.pt").write_text("optimizer.pt of step 5")
    assert folder_fault(folder) == ("optimizer.pt has changed since it was saved (manifest.json lists another sha256)")
