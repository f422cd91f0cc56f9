"""A real sweep whose large ranks do not fit into the memory of its GPUs, which is injected."""

from pathlib import Path

import pytest
from searched import ONE_AT_A_TIME, decided, sweep

from orchestrator.planning.fit import GpuMemory
from orchestrator.record import TrialState
from orchestrator.sweep.workers.fleet import Fleet

pytestmark = pytest.mark.slow


def test_trials_that_cannot_fit_never_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded base, rank 4 needs some 80 MiB and rank 256 some 130 MiB."""
    monkeypatch.setattr(Fleet, "gpu_memory", lambda *_: GpuMemory(110 * 2**20, has_grouped_products=True))
    record = sweep(
        tmp_path, *ONE_AT_A_TIME, "base.compute_dtype=bfloat16", "scheduler={kind: none}", "search.algorithm=grid",
        "search.num_trials=null", "search.skip_unfit=true", "search.space={lora.rank: {grid: [256, 4]}}",
        "training.steps=4",
    )  # fmt: skip
    (trial,) = record.trials()
    assert (trial.config.lora.rank, trial.state) == (4, TrialState.COMPLETE)
    (dropped,) = decided(record, "dropped")
    assert dropped.why.startswith("lora.rank 256: needs ")
    assert dropped.trial_id != trial.trial_id
