"""A trial that is interrupted and resumed has the results of an uninterrupted one. More in `test_fast.py`."""

import shutil
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from one_trial import ENGINES, Tiny, curve, run
from tiny import Witness

from orchestrator.adapters.bundle import verify_adapter
from orchestrator.errors import OrchestratorError
from orchestrator.record import SweepPaths, TrialState, read_metrics, read_sweep, write_record
from orchestrator.spec.search import SearchSection
from orchestrator.training.local import resume_local_trial, run_local_trial
from orchestrator.training.questions import Questions
from orchestrator.training.trial import run_trial

pytestmark = pytest.mark.slow


GROUPED = ["training.group_by_length=true", "training.seed=2", "data.max_rows=80"]  # 40 rows: 3 steps an epoch


NOISY = [*GROUPED, "training.neftune_alpha=5"]


@pytest.mark.parametrize(
    ("engine", "step", "save_steps", "more"),
    [("trl", 5, 4, []), ("fast", 9, 3, []), ("trl", 8, 7, NOISY), ("fast", 8, 7, GROUPED), ("trl", 10, 9, NOISY)],
)
def test_resumed_trial_is_identical_to_an_uninterrupted_one(
    tiny: Tiny, tmp_path: Path, engine: str, step: int, save_steps: int, more: list[str]
) -> None:
    settings = [f"training.engine={engine}", f"training.save_steps={save_steps}", "training.logging_steps=1", *more]
    spec = tiny("lora.dropout=0.1", "training.accumulation=2", *settings)
    whole = SweepPaths(tmp_path / "whole")
    uninterrupted = run(spec, whole)
    broken = SweepPaths(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, broken, Witness(die_at=step))
    record = read_sweep(broken.root)
    (interrupted,) = record.trials()
    assert (interrupted.state, interrupted.engine) == (TrialState.RUNNING, engine)
    torch.manual_seed(1234)  # another process has another random state
    resumed = resume_local_trial(record, Witness())
    assert resumed is not None
    assert curve(broken) == curve(whole)
    assert resumed.best == uninterrupted.best
    assert (resumed.step, resumed.tokens) == (uninterrupted.step, uninterrupted.tokens)
    assert resumed.seconds > 0


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pickle_planted_in_a_checkpoint_does_not_run(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    spec = tiny(f"training.engine={engine}", "training.save_steps=2")
    broken = SweepPaths(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, broken, Witness(die_at=3))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        copied = SweepPaths(shutil.copytree(broken.root, tmp_path / name))
        found = list(copied.root.glob(f"trials/*/checkpoints/checkpoint-2/{name}"))
        for file in found:
            torch.save(Planted(tmp_path / "mark"), file)
        assert found or name == "training_args.bin"
        with suppress(OrchestratorError, UnpicklingError):
            resume_local_trial(read_sweep(copied.root), Witness())
        assert not (tmp_path / "mark").exists(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_clone_sees_the_rows_that_its_donor_would_have_seen(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    """With batches of similar length, in the second epoch, in a process with another random state."""
    spec = tiny(f"training.engine={engine}", "training.logging_steps=1", "training.save_steps=7", *GROUPED)
    whole, other = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "other")
    run(spec, whole)
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, other, Witness(die_at=8))
    (donor,) = read_sweep(other.root).trials()
    paths = other.trial("clone")
    shutil.copytree(other.trial(donor.trial_id).root, paths.root)
    write_record(paths.progress, donor.model_copy(update={"trial_id": "clone", "parent": "donor", "best": None}))
    torch.manual_seed(99)
    result = run_trial(donor.config, spec, paths, other.data, Witness())
    assert result is not None
    assert (result.engine, result.state) == (engine, TrialState.COMPLETE)
    after = [(point.step, point.values) for point in read_metrics(paths) if point.step > 7]
    assert after == [each for each in curve(whole) if each[0] > 7]


def test_files_left_incomplete_by_a_kill_are_repaired(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill came while an adapter of the same step replaced the best one, and while a checkpoint was written."""
    monkeypatch.setattr(SearchSection, "resolved_mode", "max")  # the first evaluation stays the best
    spec = tiny("training.save_steps=4")
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, folder, Witness(die_at=10))
    record = read_sweep(folder.root)
    (before,) = record.trials()
    assert before.best is not None
    best = record.adapter(before)
    best.rename(best.with_name(f".replaced-{best.name}"))
    paths = folder.trial(before.trial_id)
    halves = [paths.adapters / ".building-a", paths.checkpoints / ".building-b"]
    for half in halves:
        half.mkdir()
        (half / "adapter_model.safetensors").write_bytes(b"half")
    (paths.adapters / ".replaced-step-8").mkdir()
    shutil.copytree(best.with_name(f".replaced-{best.name}"), paths.adapter(8))
    result = resume_local_trial(record, Witness())
    assert result is not None
    assert result.best is not None
    assert result.best.step == 4
    verify_adapter(record.adapter(result))
    assert [path.name for path in paths.adapters.iterdir()] == ["step-4"]


@pytest.mark.parametrize("engine", ENGINES)
def test_new_learning_rate_applies_from_the_checkpoint_on(tiny: Tiny, folder: SweepPaths, engine: str) -> None:
    """The checkpoint has the earlier learning rate, weight decay and schedule, as under PBT."""
    settings = ["training.schedule=linear", "training.warmup=0", "training.save_steps=4", "training.logging_steps=1"]
    spec = tiny(f"training.engine={engine}", *settings)
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, folder, Witness(die_at=6))
    (before,) = read_sweep(folder.root).trials()
    assert before.checkpoint == "checkpoints/checkpoint-4"
    training = spec.training.model_copy(update={"learning_rate": 5e-4, "weight_decay": 0.1})
    config = before.config.model_copy(update={"training": training})
    paths = folder.trial(before.trial_id)
    write_record(paths.progress, before.model_copy(update={"config": config}))
    result = run_trial(config, spec, paths, folder.data, Witness())
    assert result is not None
    assert result.state == TrialState.COMPLETE
    assert (result.applied["training.learning_rate"], result.applied["training.weight_decay"]) == (5e-4, 0.1)
    rates = {step: values["train/learning_rate"] for step, values in curve(folder) if "train/loss" in values}
    assert rates == pytest.approx({step: (2e-3 if step <= 4 else 5e-4) * (13 - step) / 12 for step in range(1, 13)})


def test_trial_interrupted_while_it_answers_trains_no_further_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny("evaluation={metrics: [exact_match], rows: 8, max_new_tokens: 8}")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    uninterrupted = run(spec, whole)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Questions, "score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_local_trial(spec, broken, Witness())
    resumed = resume_local_trial(read_sweep(broken.root), Witness())
    assert resumed is not None
    assert (resumed.step, resumed.tokens, resumed.best) == (12, uninterrupted.tokens, uninterrupted.best)
    assert curve(broken) == curve(whole)


def test_finished_trial_does_not_run_again(tiny: Tiny, folder: SweepPaths) -> None:
    result = run(tiny("training.steps=4"), folder)
    witness = Witness()
    assert resume_local_trial(read_sweep(folder.root), witness) == result
    assert not witness.points
