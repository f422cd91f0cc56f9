"""All kernels are compiled together, before the first step."""

from pathlib import Path
from typing import Any

import pytest
from tiny import DEMO, TINY

from orchestrator.data import prepare
from orchestrator.spec import load_spec
from orchestrator.training.fast.build import engine_for
from orchestrator.training.loop import Ground

pytestmark = pytest.mark.gpu


def test_the_probe_finds_every_kernel_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    seen = []

    def note(*_: Any, is_manual_warmup: bool, **__: Any) -> None:
        seen.append(is_manual_warmup)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    # No other test has kernels for this rank.
    spec = load_spec(DEMO, [*TINY, "base.compute_dtype=bfloat16", "lora.rank=128"])
    ground = Ground.of(spec.base, prepare(spec.data, spec.base))
    engine_for(ground.base, spec.corners(), ground.train, ground.held_out, 3)
    assert len(seen) >= 6
    assert all(seen)
