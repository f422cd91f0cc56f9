"""What is compiled ahead is what is needed: the kernels of a base's configuration are those of the base."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tiny import DEMO

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from transformers import AutoConfig, AutoModelForCausalLM
from triton.backends.compiler import GPUTarget
from triton.runtime._async_compile import FutureKernel

from orchestrator.embedded import BASE_DIR
from orchestrator.spec import TrialConfig, load_spec
from orchestrator.training.fast.ops.triton import kernels, launch
from orchestrator.training.fast.plan import factory
from orchestrator.training.fast.warmup import precompile_worker

SLOTS = 3


class Hopper:
    """A driver of a GPU that is not there."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        self.launched.append(metadata.name)

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hopper]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, hopper = triton.runtime.driver._active, Hopper()
    triton.runtime.driver.set_active(hopper)
    yield hopper
    triton.runtime.driver._active = before


@pytest.fixture
def compiled(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: ARG001  there for its time
    """Kernels that would be compiled, each by its name and key."""
    asked: list[str] = []

    def note(*, fn: Any, key: str, **_: Any) -> bool:
        asked.append(f"{fn.name} {key}")
        return True  # it is there already

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return asked


def configs(*settings: str) -> list[TrialConfig]:
    set_for_gpus = ["base.compute_dtype=bfloat16", "training.precision=bf16"]
    return load_spec(DEMO, [*set_for_gpus, *settings]).corners()


def real(held: list[TrialConfig], longest: int, tokens: int) -> None:
    """What the engine of the base itself would have compiled, at another size."""
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE_DIR), dtype=torch.bfloat16)
    choice = factory.Choice(True, "nothing", tokens)
    separate = held[0].training.reproducible
    for kind in factory.separate_specs(base, held) if separate else [factory.EngineSpec.of(base, held, SLOTS)]:
        engine = factory.cached_engine(base, kind, torch.bfloat16, longest, choice, on_gpu=True)
        engine.compile(tokens, tokens // 2)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("lora.target_modules=[q_proj, v_proj]",),
        ("training.optimizer=adamw_8bit",),
        ("training.reproducible=true",),
    ],
)
@pytest.mark.parametrize(("longest", "tiles"), [(64, 1), (448, 64)])
def test_kernels_are_those_of_the_base(compiled: list[str], settings: tuple[str], longest: int, tiles: int) -> None:
    held = configs(*settings)
    precompile_worker.compile_for(held, SLOTS)
    ahead = set(compiled)
    compiled.clear()
    real(held, longest, tiles * kernels.TILE)
    assert set(compiled) == ahead
    assert len(ahead) > 10


@triton.jit
def filled(out, value):  # type: ignore[no-untyped-def]
    tl.store(out, value)


def test_each_kernel_is_compiled_and_has_its_launcher(
    hopper: Hopper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of a kernel is none yet: in Triton 3.6 it has nothing of it but `result`."""
    monkeypatch.delattr(FutureKernel, "__getattr__", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for _ in range(2):  # at first promised, then there
        with launch.compiled_together():
            for value in (2, 3, 0.5):
                launch.launch(filled, (1,), torch.zeros(1), value)
        assert hopper.launched == ["filled", "filled"], "whole numbers have one, reals another"
        hopper.launched.clear()
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


@pytest.mark.parametrize("setting", ["base.compute_dtype=float32", "lora.rank=512"])
def test_what_no_gpu_holds_has_none(compiled: list[str], setting: str) -> None:
    precompile_worker.compile_for(configs(setting), SLOTS)
    assert not compiled


@pytest.mark.parametrize("fails", [False, True])
def test_of_two_that_would_compile_the_same_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The other waits, and does it after all if the first has not got through."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    order: list[str] = []
    others: list[Thread] = []

    def compile_too(task: str) -> None:
        others.append(Thread(target=precompile_worker.once, args=(task, lambda: order.append(task))))
        others[-1].start()

    def first() -> None:
        compile_too("another")
        others[0].join(10)
        assert order == ["another"]
        compile_too("the same")
        others[1].join(0.5)
        assert order == ["another"]
        if fails:
            raise RuntimeError("it fails")

    with suppress(RuntimeError):
        precompile_worker.once("the same", first)
    others[1].join(10)
    assert order == ["another"] + fails * ["the same"]
    precompile_worker.once("the same", lambda: order.append("later"))
    assert order[-1] == "later", "what was done at another time may be of other kernels"
