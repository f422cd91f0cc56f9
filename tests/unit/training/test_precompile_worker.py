"""The kernels that are compiled from a base's configuration are those that the base itself needs."""

import json
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from family_cases import FAMILY_CASES
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
from orchestrator.training.fast.plan.engine_spec import EngineSpec, separate_specs
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.warmup import precompile_worker

SLOTS = 3


class Hopper:
    """Triton's driver of an imaginary Hopper GPU."""

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
    import_module("bitsandbytes")  # where there seems to be a GPU, its import fails without a real one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, hopper = triton.runtime.driver._active, Hopper()
    triton.runtime.driver.set_active(hopper)
    yield hopper
    triton.runtime.driver._active = before


@pytest.fixture
def compiled(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: ARG001  active during the test
    """List the kernels that would be compiled, each by its name and key."""
    requested: list[str] = []

    def note(*, fn: Any, key: str, **_: Any) -> bool:
        requested.append(f"{fn.name} {key}")
        return True  # pretend that it is compiled

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return requested


def configs(*settings: str) -> list[TrialConfig]:
    for_gpus = ["base.compute_dtype=bfloat16", "training.precision=bf16"]
    return load_spec(DEMO, [*for_gpus, *settings]).corners()


def compile_with_real_base(trials: list[TrialConfig], longest: int, tokens: int, folder: Path = BASE_DIR) -> None:
    """Compile what the engines of the base itself need, for other numbers of tokens."""
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    option = MemoryOption(True, "nothing", tokens)
    separate = trials[0].training.reproducible
    for spec in separate_specs(base, trials) if separate else [EngineSpec.of(base, trials, SLOTS)]:
        engine = factory.cached_engine(base, spec, torch.bfloat16, longest, option, on_gpu=True)
        engine.compile(tokens, tokens // 2)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("lora.target_modules=[q_proj, v_proj]",),
        ("training.optimizer=adamw_8bit",),
        ("training.reproducible=true",),
        ("lora.rank_pattern={layers.3.mlp.up_proj: 100}",),
        ("lora.rank_pattern={layers.0.mlp.up_proj: 100}", "lora.layers_to_transform=[0, 2]"),
    ],
)
@pytest.mark.parametrize(("longest", "tiles"), [(64, 1), (448, 64)])
def test_kernels_are_those_of_the_real_base(
    compiled: list[str], settings: tuple[str], longest: int, tiles: int
) -> None:
    trials = configs(*settings)
    precompile_worker.compile_for(trials, SLOTS)
    precompiled = set(compiled)
    compiled.clear()
    compile_with_real_base(trials, longest, tiles * kernels.TILE)
    assert set(compiled) == precompiled
    assert len(precompiled) > 10


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_kernels_of_each_family(compiled: list[str], tmp_path: Path, name: str) -> None:
    """The file of a configuration is read without transformers, whose defaults it may lack."""
    FAMILY_CASES[name][0].save_pretrained(tmp_path)
    trials = configs(f"base.model={tmp_path}", "lora.target_modules=all-linear")
    precompile_worker.compile_for(trials, SLOTS)
    precompiled = set(compiled)
    compiled.clear()
    compile_with_real_base(trials, 64, 2 * kernels.TILE, tmp_path)
    assert set(compiled) == precompiled
    assert len(precompiled) > 10


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss with a window, nf4"])
def test_adapted_experts_have_the_same_kernels(compiled: list[str], tmp_path: Path, name: str, optimizer: str) -> None:
    FAMILY_CASES[name][0].save_pretrained(tmp_path)
    targets = ["lora.target_modules=[q_proj, experts]", "lora.dropout=0", "search.space={}", "search.tied={}"]
    trials = configs(f"base.model={tmp_path}", *targets, f"training.optimizer={optimizer}")
    precompile_worker.compile_for(trials, SLOTS)
    precompiled = set(compiled)
    compiled.clear()
    compile_with_real_base(trials, 64, 2 * kernels.TILE, tmp_path)
    assert set(compiled) == precompiled
    assert len(precompiled) > 10


@triton.jit
def filled(out, value):  # type: ignore[no-untyped-def]
    tl.store(out, value)


def test_each_kernel_is_compiled_and_has_its_launcher(
    hopper: Hopper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton returns a future that is not a kernel yet: in Triton 3.6 its only attribute is `result`."""
    monkeypatch.delattr(FutureKernel, "__getattr__", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for _ in range(2):  # at first a future, then a kernel
        with launch.compiled_together():
            for value in (2, 3, 0.5):
                launch.launch(filled, (1,), torch.zeros(1), value)
        assert hopper.launched == ["filled", "filled"], "integers share a launcher, floats have another"
        hopper.launched.clear()
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


@pytest.mark.parametrize("setting", ["base.compute_dtype=float32", "lora.rank=512"])
def test_trials_that_no_gpu_can_hold_have_no_kernels(compiled: list[str], setting: str) -> None:
    precompile_worker.compile_for(configs(setting), SLOTS)
    assert not compiled


@pytest.mark.parametrize(
    "fields", [{"num_local_experts": 4}, {"layer_types": ["mamba", "attention"]}, {"layer_types": ["attention"] * 2}]
)
def test_hybrids_that_the_engine_refuses_have_no_kernels(
    compiled: list[str], tmp_path: Path, fields: dict[str, Any]
) -> None:
    FAMILY_CASES["granite 4, nf4"][0].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    precompile_worker.compile_for(configs(f"base.model={tmp_path}"), SLOTS)
    assert bool(compiled) == (fields == {"layer_types": ["attention"] * 2})


@pytest.mark.parametrize("fails", [False, True])
def test_one_of_two_processes_runs_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The other one waits, and runs the task itself if the first one fails."""
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
    assert order[-1] == "later", "a task that was done earlier may have compiled other kernels"
