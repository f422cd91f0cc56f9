"""All kernels are compiled before the first step: by another process ahead, or else by the probe."""

from pathlib import Path
from typing import Any

import pytest
from tiny import DEMO, TINY

from orchestrator.data import prepare
from orchestrator.spec import load_spec
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.joint import engine_for
from orchestrator.training.fast.plan.factory import release
from orchestrator.training.fast.warmup import precompile

pytestmark = pytest.mark.gpu


def test_another_process_compiles_all_kernels_that_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This test must be the first of its folder: the process must have no kernels yet.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = load_spec(DEMO, [*TINY, "base.compute_dtype=bfloat16", "lora.rank=32"])
    precompile.start(spec.corners(), 3)
    precompile.join()
    compiled = {path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".so")}
    assert len([path for path in compiled if path.suffix == ".cubin"]) > 10
    inputs = TrialInputs.load(spec.base, prepare(spec.data, spec.base))
    engine_for(inputs.base, spec.corners(), inputs.train, inputs.held_out, 3)
    assert {path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".so")} == compiled
    release(inputs.base)


def test_the_probe_finds_every_kernel_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    are_warmups = []

    def note(*_: Any, is_manual_warmup: bool, **__: Any) -> None:
        are_warmups.append(is_manual_warmup)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    # No other test compiles kernels for this rank.
    spec = load_spec(DEMO, [*TINY, "base.compute_dtype=bfloat16", "lora.rank=128"])
    inputs = TrialInputs.load(spec.base, prepare(spec.data, spec.base))
    engine_for(inputs.base, spec.corners(), inputs.train, inputs.held_out, 3)
    assert len(are_warmups) >= 6
    assert all(are_warmups)
