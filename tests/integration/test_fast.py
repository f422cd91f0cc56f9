"""The fast engine without comparison to trl: late metrics, NaN, resumes, refusals."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from both_engines import FEW_ROWS, train
from safetensors.torch import load_file
from tiny import Witness

from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths, TrialState, read_metrics, read_sweep
from orchestrator.spec import SweepSpec
from orchestrator.training.fast.step.engine import AHEAD, Engine, StepMetrics
from orchestrator.training.local import resume_local_trial, run_local_trial

pytestmark = pytest.mark.slow


Tiny = Callable[..., SweepSpec]


class Late:
    """Pending metrics that never say they have arrived, so that they are read as late as possible."""

    is_ready = False

    def __init__(self, pending: Any) -> None:
        self._pending = pending

    def read(self) -> StepMetrics:
        metrics: StepMetrics = self._pending.read()
        return metrics


def test_metrics_that_arrive_late_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["lora.dropout=0.1", "training.logging_steps=3", "training.eval_steps=5", "training.steps=14"]
    at_once = train("fast", tmp_path / "at_once", *settings)
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine, spans: Late(step(engine, spans)))
    late = train("fast", tmp_path / "late", *settings)
    assert late.logs == at_once.logs
    assert late.evaluations == at_once.evaluations
    assert late.events == at_once.events
    assert all(torch.equal(late.end[name], end) for name, end in at_once.end.items())


@pytest.mark.parametrize("is_late", [False, True])
def test_loss_that_becomes_nan_between_logs_is_caught_within_a_few_steps(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    settings = ["training.logging_steps=1000", "training.eval_steps=10", "scheduler.kind=none", "training.steps=30"]
    step, done = Engine.step, 0

    def poisoned(engine: Engine, spans: Any) -> Any:
        nonlocal done
        done += 1
        if done == 12:
            engine.adapters.weights[0, :100] = math.nan
        return Late(step(engine, spans)) if is_late else step(engine, spans)

    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(TrialError, match="loss is nan at step 12"):
        run_local_trial(tiny(*settings), folder, Witness())
    assert done <= 12 + (AHEAD if is_late else 0)
    (trial,) = read_sweep(folder.root).trials()
    assert trial.state == TrialState.FAILED
    assert "loss is nan at step 12" in (trial.error or "")
    assert trial.best is not None
    assert trial.best.step == 10
    weights = load_file(folder.trial(trial.trial_id).root / trial.best.adapter / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_trial_interrupted_repeatedly_is_identical_to_an_uninterrupted_one(tiny: Tiny, tmp_path: Path) -> None:
    """With five steps an epoch, it resumes within the first epoch, within the second, and between two."""
    spec = tiny(*FEW_ROWS, "lora.dropout=0.2", "training.logging_steps=1", "training.save_steps=2", "training.seed=3")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    uninterrupted = run_local_trial(spec, whole, Witness())
    assert uninterrupted is not None
    assert uninterrupted.engine == "fast"
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, broken, Witness(die_at=3))
    for saved, die_at in ((2, 7), (6, 11)):
        assert read_sweep(broken.root).trials()[0].checkpoint == f"checkpoints/checkpoint-{saved}"
        with pytest.raises(KeyboardInterrupt):
            resume_local_trial(read_sweep(broken.root), Witness(die_at=die_at))
    assert read_sweep(broken.root).trials()[0].checkpoint == "checkpoints/checkpoint-10"
    resumed = resume_local_trial(read_sweep(broken.root), Witness())
    assert resumed is not None
    assert resumed.best is not None
    assert uninterrupted.best is not None
    assert resumed.best.value == uninterrupted.best.value
    assert (resumed.best, resumed.tokens, resumed.step) == (uninterrupted.best, uninterrupted.tokens, 12)
    (one,), (other,) = points(whole), points(broken)
    assert len(one) == 12 + 3
    assert other == one
    adapters = [
        paths.trial(result.trial_id).root / resumed.best.adapter / "adapter_model.safetensors"
        for paths, result in ((whole, uninterrupted), (broken, resumed))
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def points(folder: SweepPaths) -> Iterator[Sequence[tuple[int, int, dict[str, float]]]]:
    for trial_id in folder.trial_ids():
        yield [(point.step, point.tokens, point.values) for point in read_metrics(folder.trial(trial_id))]


def test_fast_engine_that_the_base_excludes_is_refused_when_the_trial_begins(tiny: Tiny, folder: SweepPaths) -> None:
    reason = "training.engine fast does not support base.compute_dtype float32 under precision bf16"
    with pytest.raises(TrialError, match=reason):
        run_local_trial(tiny("training.engine=fast", "training.precision=bf16"), folder, Witness())
    (trial,) = read_sweep(folder.root).trials()
    assert trial.state == TrialState.FAILED
    assert reason in (trial.error or "")


def test_searched_dropout_of_many_digits_is_read_back(tiny: Tiny, folder: SweepPaths) -> None:
    result = run_local_trial(tiny("training.engine=fast", "lora.dropout=0.0734521938"), folder, Witness())
    assert result is not None
    assert result.applied["lora.dropout"] == pytest.approx(0.0734521938, rel=1e-9)
