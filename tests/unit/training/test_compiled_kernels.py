"""The interpreter takes what the compiler may not: kernels of a pack, compiled for an H100 or H200 without one."""

from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from orchestrator.training.fast.ops.triton import adamw, lora_backward, lora_forward

HOPPER = GPUTarget("cuda", 90, 32)
BFLOAT16 = ("x", "y", "low", "gradient", "x_gradient", "by_low")
INTEGERS = (
    "tickets",
    "tiles",
    "first_tiles",
    "end_tiles",
    "counters",
    "keys",
    "thresholds",
    "slot_ranks",
    "strides",
    "applies",
    "programs",
)
BYTES = ("moments1", "moments2")
"""In eight bits."""
SCALARS = ("stride", "y_stride", "low_stride", "features", "num_tiles", "num_slots", "size", "blocks")
PACK = {"RANK": 32, "PATHS": 2, "TILE": 64}

KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "down": (lora_forward._down, PACK | {"SPLITS": 4, "BLOCK_K": 64}),
    "up": (lora_forward._up, PACK | {"BLOCK_N": 64}),
    "up backward": (lora_backward._up_backward, PACK | {"SPLITS": 4, "LAYERS": 2, "BLOCK_N": 64}),
    "down backward": (lora_backward._down_backward, PACK | {"SPLITS": 2, "LAYERS": 2, "BLOCK_K": 32}),
    "update in eight bits": (
        adamw._update_eight_bit,
        {"ELEMENTS": 512, "SHARED": 256, "SMALL": 4096, "RANK": 64},
    ),
    "norms": (adamw._norms, {"BLOCK": 1024}),
    "squares": (adamw._squares, {"ELEMENTS": 16384, "BLOCK": 1024, "RANK": 32, "MIXED": True}),
    "update": (adamw._update, {"ELEMENTS": 16384, "BLOCK": 1024, "RANK": 32, "MIXED": True}),
}


def type_of(name: str, constants: dict[str, Any]) -> str:
    if name in BFLOAT16:
        return "*bf16"
    if name in BYTES and "SHARED" in constants:
        return "*u8"
    if name in INTEGERS:
        return "*i32"
    is_scalar = name in SCALARS or name.startswith(("num", "column", "width"))
    return "i32" if is_scalar else "*fp32"


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = KERNELS[name]
    signature = {each: "constexpr" if each in constants else type_of(each, constants) for each in kernel.arg_names}
    places = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=places), target=HOPPER)
    assert compiled.asm["cubin"]
    assert ".f64" not in compiled.asm["ptx"], "of a constant that float32 has not"
