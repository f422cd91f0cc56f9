"""A checkpoint that one trial passes on to another, through Tune's own methods but without a running Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.record import MetricPoint, SweepPaths, TrialResult, TrialState, read_sweep, write_record
from orchestrator.record.checked import append_record
from orchestrator.record.checkpoints import seal_checkpoint
from orchestrator.sweep.workers.trainable import TrialTrainable


class Local(TrialTrainable):
    """A trainable of this process, which claims its trial without a worker."""

    def setup(self, config: dict[str, Any], **_: Any) -> None:
        super().setup({}, folder=config["folder"], workers=None)  # type: ignore[arg-type]

    @property
    def trial_id(self) -> str:
        return str(self.config["id"])

    def _claim_trial(self) -> Any:
        return SimpleNamespace(end=lambda: None)


def running(paths: SweepPaths, trial_id: str, checkpoint: str | None) -> None:
    """Write a running trial, with the folder of its checkpoint."""
    spec, trial = read_sweep(paths.root).info.spec, paths.trial(trial_id)
    step = 4 if checkpoint else 0
    result = TrialResult(
        trial_id=trial_id, state=TrialState.RUNNING, config=spec.trial_config({}), metric="eval/loss", mode="min",
        step=step, checkpoint=checkpoint,
    )  # fmt: skip
    write_record(trial.config, result.config)
    write_record(trial.progress, result)
    append_record(trial.metrics, MetricPoint(step=step, tokens=1, time_s=1.0, values={"train/loss": 1.0}))
    if checkpoint:
        (trial.root / checkpoint).mkdir(parents=True)
        (trial.root / checkpoint / "optimizer.pt").write_text("moments")
        seal_checkpoint(trial.root / checkpoint)


@pytest.fixture
def paths(tmp_path: Path, make_sweep: Any) -> SweepPaths:
    made: SweepPaths = make_sweep(tmp_path / "s", {})
    running(made, "donor", "checkpoints/checkpoint-4")
    running(made, "clone", None)
    return made


def test_a_checkpoint_is_taken_over_without_a_pickle(paths: SweepPaths, tmp_path: Path) -> None:
    donor, clone = (Local({"folder": str(paths.root), "id": name}) for name in ("donor", "clone"))
    (tmp_path / "tune").mkdir()
    donor.save(str(tmp_path / "tune"))
    assert [file.name for file in (tmp_path / "tune").glob("*.pkl")] == []
    assert (tmp_path / "tune" / "checkpoint.json").is_file()
    clone.restore(str(tmp_path / "tune"))
    taken = {trial.trial_id: trial for trial in read_sweep(paths.root).trials()}["clone"]
    assert (taken.step, taken.checkpoint) == (4, "checkpoints/checkpoint-4")
    assert taken.parent == "donor/checkpoints/checkpoint-4"
    assert (paths.trial("clone").checkpoints / "checkpoint-4" / "optimizer.pt").read_text() == "moments"


def test_a_trial_without_a_checkpoint_passes_nothing_on(paths: SweepPaths, tmp_path: Path) -> None:
    clone, donor = (Local({"folder": str(paths.root), "id": name}) for name in ("clone", "donor"))
    (tmp_path / "tune").mkdir()
    clone.save(str(tmp_path / "tune"))
    before = paths.trial("donor").progress.read_bytes()
    donor.restore(str(tmp_path / "tune"))
    assert paths.trial("donor").progress.read_bytes() == before
