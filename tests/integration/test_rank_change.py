"""A trial that continues from a checkpoint of another rank, as under PBT: its loss stays near the donor's."""

from collections.abc import Callable

import pytest
from tiny import Witness

from orchestrator.record import SweepPaths, TrialState, read_metrics, read_sweep, read_trial, write_record
from orchestrator.spec import SweepSpec
from orchestrator.training.local import resume_local_trial, run_local_trial

pytestmark = pytest.mark.slow


def losses(paths: SweepPaths) -> dict[int, float]:
    (trial_id,) = paths.trial_ids()
    points = read_metrics(paths.trial(trial_id))
    return {point.step: point.values["eval/loss"] for point in points if "eval/loss" in point.values}


@pytest.mark.parametrize("engine", ["fast", "trl"])
@pytest.mark.parametrize(("rank", "alpha"), [(16, 32), (16, 16), (4, 8), (8, 4)])
def test_a_trial_continues_at_another_rank(
    tiny: Callable[..., SweepSpec], folder: SweepPaths, engine: str, rank: int, alpha: int
) -> None:
    """After 8 steps at rank 8 and alpha 16, the learning rate is so small that the loss shows the weights alone."""
    common = [
        f"training.engine={engine}", "training.steps=12", "training.save_steps=8", "training.eval_steps=4",
        "training.schedule=constant", "search.tied={}",
    ]  # fmt: skip
    assert run_local_trial(tiny(*common, "lora.rank=8", "lora.alpha=16"), folder, Witness(stop_at=9)) is None
    record = read_sweep(folder.root)
    (trial_id,) = folder.trial_ids()
    donor = read_trial(folder.trial(trial_id), record.info)
    assert donor.checkpoint == "checkpoints/checkpoint-8"
    config = tiny(*common, f"lora.rank={rank}", f"lora.alpha={alpha}", "training.learning_rate=1e-7").trial_config({})
    write_record(folder.trial(trial_id).progress, donor.model_copy(update={"config": config, "applied": {}}))
    write_record(folder.trial(trial_id).config, config)
    spec = record.info.spec.model_copy(update={name: getattr(config, name) for name in ("lora", "training")})
    write_record(folder.sweep, record.info.model_copy(update={"spec": spec}))
    result = resume_local_trial(read_sweep(folder.root), Witness())
    assert result is not None
    assert (result.state, result.step) == (TrialState.COMPLETE, 12)
    assert (result.applied["lora.rank"], result.applied["lora.alpha"]) == (rank, alpha)
    found = losses(folder)
    fallen = found[4] - found[8]
    assert fallen > 0.02, "the donor has learned something that could be lost"
    assert abs(found[12] - found[8]) < (0.02 if rank >= 8 else 0.35) * fallen
