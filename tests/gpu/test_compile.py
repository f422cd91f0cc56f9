"""All kernels are compiled together, before the first step; or before that, by another process."""

from pathlib import Path
from typing import Any

import pytest
from tiny import DEMO, TINY

from orchestrator.data import prepare
from orchestrator.spec import load_spec
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.plan.factory import engine_for, release
from orchestrator.training.fast.warmup import precompile

pytestmark = pytest.mark.gpu


def test_what_is_compiled_ahead_is_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first test of this folder: this process must have no kernels yet.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = load_spec(DEMO, [*TINY, "base.compute_dtype=bfloat16", "lora.rank=32"])
    precompile.start(spec.corners(), 3)
    precompile.join()
    made = {path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".so")}
    assert len([path for path in made if path.suffix == ".cubin"]) > 10
    ground = TrialInputs.load(spec.base, prepare(spec.data, spec.base))
    engine_for(ground.base, spec.corners(), ground.train, ground.held_out, 3)
    assert {path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".so")} == made
    release(ground.base)


def test_the_probe_finds_every_kernel_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    seen = []

    def note(*_: Any, is_manual_warmup: bool, **__: Any) -> None:
        seen.append(is_manual_warmup)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    # No other test has kernels for this rank.
    spec = load_spec(DEMO, [*TINY, "base.compute_dtype=bfloat16", "lora.rank=128"])
    ground = TrialInputs.load(spec.base, prepare(spec.data, spec.base))
    engine_for(ground.base, spec.corners(), ground.train, ground.held_out, 3)
    assert len(seen) >= 6
    assert all(seen)
