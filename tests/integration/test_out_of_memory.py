"""Trials that run out of GPU memory go on with less, and their losses stay the same. The errors are injected."""

import signal
from typing import Any

import pytest
import torch
from one_trial import Tiny, curve, run
from tiny import Witness

from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths, TrialState
from orchestrator.signals import Signalled
from orchestrator.training.fast.step.engine import Engine

pytestmark = pytest.mark.slow

SETTINGS = ["training.batch_size=4", "training.learning_rate=2e-4", "lora.dropout=0"]


@pytest.fixture
def max_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most rows of a forward pass of SFTTrainer: beyond them, memory is out from the seventh pass on."""
    from trl.trainer.sft_trainer import SFTTrainer

    limit, passes, training_step = {"rows": 100, "failures": 0}, [0], SFTTrainer.training_step

    def limited(trainer: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        passes[0] += 1
        if passes[0] > 6 and len(inputs["input_ids"]) > limit["rows"]:
            limit["failures"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training_step(trainer, model, inputs, *rest)

    monkeypatch.setattr(SFTTrainer, "training_step", limited)
    return limit


@pytest.mark.parametrize("variant", [[], ["training.loss=dft"], ["training.group_by_length=true"]])
def test_smaller_passes_give_the_same_steps(
    tiny: Tiny, folder: SweepPaths, max_rows: dict[str, int], variant: list[str]
) -> None:
    settings = [*SETTINGS, *variant, "training.engine=trl"]
    whole = run(tiny(*settings), SweepPaths(folder.root.parent / "whole"))
    max_rows["rows"], witness = 1, Witness()
    result = run(tiny(*settings), folder, witness)
    assert result.state == TrialState.COMPLETE
    assert max_rows["failures"] == 2  # with 4 rows, and with 2
    (warning,) = [each for each in result.warnings if "out of GPU memory" in each]
    assert "continues with 1 rows in a forward pass and 4 times as many passes in a step" in warning
    assert result.tokens == whole.tokens
    points, expected = curve(folder), curve(SweepPaths(folder.root.parent / "whole"))
    assert [step for step, _ in points] == [step for step, _ in expected]
    for (_, values), (_, wanted) in zip(points, expected, strict=True):
        assert values == pytest.approx(wanted, rel=1e-4)


def test_one_row_that_does_not_fit_fails_the_trial(tiny: Tiny, folder: SweepPaths, max_rows: dict[str, int]) -> None:
    max_rows["rows"] = 0
    with pytest.raises(TrialError, match="out of GPU memory with one row in a forward pass"):
        run(tiny(*SETTINGS, "training.engine=trl"), folder)
    assert max_rows["failures"] == 3


def test_a_signal_is_heard_by_a_trial_that_runs_out_of_memory(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not begin again with less."""
    step, steps = Engine.step, [0]

    def limited(engine: Engine, spans: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            signal.raise_signal(signal.SIGTERM)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", limited)
    with pytest.raises(Signalled):
        run(tiny(*SETTINGS), folder)
    assert steps == [3]


def test_fast_engine_takes_a_smaller_plan(tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tiny(*SETTINGS), SweepPaths(folder.root.parent / "whole"))
    step, steps = Engine.step, [0]

    def limited(engine: Engine, spans: Any) -> Any:
        steps[0] += 1
        if steps[0] == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(engine, spans)

    monkeypatch.setattr(Engine, "step", limited)
    result = run(tiny(*SETTINGS), folder)
    assert result.state == TrialState.COMPLETE
    assert result.engine == "fast"
    assert result.memory_plan != whole.memory_plan
    (warning,) = [each for each in result.warnings if "out of GPU memory" in each]
    assert result.memory_plan is not None
    assert f"continues with recompute={result.memory_plan['recompute']} and passes of" in warning
    expected = curve(SweepPaths(folder.root.parent / "whole"))
    assert [step for step, _ in curve(folder)] == [step for step, _ in expected]
    for (_, values), (_, wanted) in zip(curve(folder), expected, strict=True):
        assert values == pytest.approx(wanted, rel=1e-4)
