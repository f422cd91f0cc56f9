"""Kernels for several slots compile for an H100 or H200: the interpreter accepts code that the compiler refuses.

No GPU is needed.
"""

from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from orchestrator.training.fast.ops.triton import adamw, lora_backward, lora_forward

HOPPER = GPUTarget("cuda", 90, 32)
BFLOAT16 = ("x", "y", "lora_hidden", "dy", "dx", "dlora_hidden")
INTEGERS = (
    "split_k_semaphores",
    "tile_slots",
    "first_tiles",
    "end_tiles",
    "dropout_positions",
    "keys",
    "thresholds",
    "slot_ranks",
    "layer_ranks",
    "rank_layout",
    "applies",
    "programs",
)
BYTES = ("moments1", "moments2")
"""uint8 in the kernel for eight-bit moments."""
SCALARS = ("slot_stride", "y_stride", "hidden_stride", "in_features", "num_tiles", "num_slots", "size", "blocks")
SEVERAL_SLOTS = {"RANK": 32, "RANK_VARIANTS": 2, "TILE": 64}

KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "down": (lora_forward._down, SEVERAL_SLOTS | {"SPLITS": 4, "BLOCK_K": 64}),
    "up": (lora_forward._up, SEVERAL_SLOTS | {"BLOCK_N": 64}),
    "up backward": (lora_backward._up_backward, SEVERAL_SLOTS | {"SPLITS": 4, "LAYERS": 2, "BLOCK_N": 64}),
    "down backward": (lora_backward._down_backward, SEVERAL_SLOTS | {"SPLITS": 2, "LAYERS": 2, "BLOCK_K": 32}),
    "update in eight bits": (
        adamw._update_eight_bit,
        {"ELEMENTS": 512, "SHARED": 256, "SMALL": 4096},
    ),
    "norms": (adamw._norms, {"BLOCK": 1024}),
    "squares": (adamw._sum_squares, {"ELEMENTS": 16384, "BLOCK": 1024, "MIXED_RANKS": True}),
    "update": (adamw._update, {"ELEMENTS": 16384, "BLOCK": 1024, "MIXED_RANKS": True}),
}


def type_of(name: str, constants: dict[str, Any]) -> str:
    if name in BFLOAT16:
        return "*bf16"
    if name in BYTES and "SHARED" in constants:
        return "*u8"
    if name in INTEGERS:
        return "*i32"
    is_scalar = name in SCALARS or name.startswith(("num", "column", "width", "module_id"))
    return "i32" if is_scalar else "*fp32"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = KERNELS[name]
    signature = {each: "constexpr" if each in constants else type_of(each, constants) for each in kernel.arg_names}
    places = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=places), target=HOPPER)
    assert compiled.asm["cubin"]
    assert ".f64" not in compiled.asm["ptx"], "a constant that float32 cannot hold makes the kernel compute in float64"
