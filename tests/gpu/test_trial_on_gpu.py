"""Trials on a GPU: the GPU is used, its metrics are recorded, and precisions and paged optimizers train."""

from pathlib import Path

import pytest
from tiny import DEMO, TINY, Witness

from orchestrator.record import SweepPaths, TrialState, read_metrics
from orchestrator.spec import load_spec
from orchestrator.training.local import run_local_trial

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.precision=auto"],
        ["training.precision=fp16"],
        ["training.precision=none", "base.compute_dtype=float16"],
        ["training.optimizer=paged_adamw_32bit"],
        ["training.optimizer=paged_adamw_8bit", "training.recompute=true"],
        ["training.precision=none", "training.tf32=true"],
        ["lora.rslora=true", "lora.layers_to_transform=[0, 3]"],
        ["lora.rank_pattern={down_proj: 4, q_proj: 40}", "lora.alpha_pattern={'.*mlp.*': 3}"],
        [
            "lora.rank_pattern={v_proj: 40}",
            "lora.alpha_pattern={q_proj: 3}",
            "lora.rank=64",
            "training.optimizer=adamw_8bit",
        ],
        ["lora.dora=true"],
        ["lora.init=eva", "lora.rank=4"],
        ["lora.init=olora", "lora.modules_to_save=[norm]"],
        ["lora.init=pissa", "base.quantization=none"],
        ["base.quantization=int8"],
        ["base.quantization=int8", "lora.dora=true"],
        ["base.new_tokens=['<|reply|>']"],
    ],
    ids=",".join,
)
def test_trial_trains_on_the_gpu(tmp_path: Path, overrides: list[str]) -> None:
    paths = SweepPaths(tmp_path / "sweep")
    result = run_local_trial(load_spec(DEMO, [*TINY, *overrides]), paths, Witness())
    assert result is not None
    assert result.state == TrialState.COMPLETE
    assert result.device != "cpu"
    assert result.gpu_seconds == pytest.approx(result.seconds, abs=0.002)
    assert 0 < (result.peak_memory_gib or 0) < 1
    points = read_metrics(paths.trial(result.trial_id))
    losses = [point.values["eval/loss"] for point in points if "eval/loss" in point.values]
    assert losses[-1] < losses[0]
