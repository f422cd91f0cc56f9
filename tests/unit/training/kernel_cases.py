"""The Triton kernels under test, and batches and adapters for them.

On a GPU these are the real kernels, else copies that Triton's interpreter runs. All test files share one import.
"""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters
from orchestrator.training.fast.step.flat_batch import BucketShape, FlatBatch, Span, TokenizedRows

pytest.importorskip("triton")

from orchestrator.training.fast.ops.triton.launch import MANY_SLOTS

PACKAGE = "orchestrator.training.fast.ops.triton"
LEAVES = (
    "launch", "lora_common", "lora_forward", "lora_backward", "attention_common", "attention", "adamw", "norm_glu_ce",
    "qk_norm", "kernels",
)  # fmt: skip
MODULES = [f"{PACKAGE}.{leaf}" for leaf in LEAVES]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5
"""Largest norm of the difference, relative to the norm of the reference, which is computed in float32."""
NUM_SLOTS, EXPERT_RANK = 4, 8
RANKS = {0: 50, 1: 16, 2: 4, 3: 20, 4: 64, 5: 8, 6: 33, 7: 12}
"""Rank of each slot where there are several; the stack rank where that is smaller."""


def load_kernels() -> ModuleType:
    """Import the kernels. Without a GPU, import copies of them and of Triton that interpret.

    Other tests do not see these copies.
    """
    if ON_GPU:
        return importlib.import_module(MODULES[-1])

    def remove() -> dict[str, ModuleType]:
        return {
            name: sys.modules.pop(name)
            for name in list(sys.modules)
            if name in MODULES or (name.split(".")[0] == "triton" and not name.startswith("triton._C"))
        }

    package, others, before = importlib.import_module(PACKAGE), remove(), os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        kernels = importlib.import_module(MODULES[-1])
        patch_interpreter(importlib.import_module("triton.runtime.interpreter"))
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        remove()
        sys.modules.update(others)
        for name in MODULES:
            leaf = name.removeprefix(f"{PACKAGE}.")
            vars(package).pop(leaf, None)
            if name in others:
                setattr(package, leaf, others[name])
    return kernels


def patch_interpreter(interpreter: Any) -> None:
    """Make tensors usable as indices: NumPy 2.4 refuses arrays of one element as integers, which Triton 3.6 uses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


kernels = load_kernels()


def make_batch(lengths: dict[int, list[int]], num_tiles: int, num_slots: int, **table: Any) -> FlatBatch:
    """Make a flat batch of these sequences.

    Args:
        lengths: of the sequences, by slot.
        num_tiles: of the flat batch.
        num_slots: of the engine.
        table: values of the slots' table, one for all slots or a dictionary by slot.
    """
    generator = np.random.default_rng(0)
    spans = []
    for slot, slot_lengths in lengths.items():
        ids = [generator.integers(0, 90, length).tolist() for length in slot_lengths]
        labels = [[-100, *row[1:]] if len(row) < 3 else [-100, -100, *row[2:]] for row in ids]
        values = {
            "key": 1234567 + 987654321 * slot % 2**30,
            "threshold": 0,
            "keep_scale": 1.0,
            "scale": 1.0,
            "rank": 64,
            "loss_weight": 0.1,
            "applies": 1,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "one_minus_beta1": 0.1,
            "one_minus_beta2": 0.01,
            "epsilon": 1e-8,
            "bias_correction1": 0.1,
            "bias_correction2": 0.01,
            "max_norm": 1.0,
        }
        values |= {name: value[slot] if isinstance(value, dict) else value for name, value in table.items()}
        spans.append(Span(slot, TokenizedRows(ids, labels), range(len(ids)), values, first_token=17))
    num_tokens = num_tiles * kernels.TILE
    max_targets = min(num_tokens, sum(span.num_targets for span in spans) + 3)
    shape = BucketShape(num_tokens, max_targets, 16, num_slots, kernels.TILE, 100)
    buffer = shape.buffer("cpu")
    shape.fill(buffer.numpy(), spans)
    return shape.view(buffer.to(DEVICE))


def dropout(probability: float) -> tuple[int, float]:
    """Return threshold and keep_scale."""
    return int(probability * 2**31), 1 / (1 - probability)


def several_slots(num_slots: int = NUM_SLOTS) -> FlatBatch:
    """Make a batch of slots out of order: one idle, one without dropout; a tile of padding counts as slot 0."""
    drops = {0: dropout(0.5), 2: dropout(0.1), 3: dropout(0.0)}
    return make_batch(
        {2: [5, 61, 30], 0: [50], 3: [64]},
        5,
        num_slots,
        threshold={slot: threshold for slot, (threshold, _) in drops.items()},
        keep_scale={slot: scale for slot, (_, scale) in drops.items()},
        scale={0: 2.0, 2: 0.5, 3: 1.0},
        rank=RANKS,
        loss_weight={0: 0.3, 2: 0.01, 3: 1.0},
    )


def one_slot() -> FlatBatch:
    threshold, keep_scale = dropout(0.2)
    return make_batch({0: [5, 61, 30]}, 2, 1, threshold=threshold, keep_scale=keep_scale, scale=0.5)


def many_slots() -> FlatBatch:
    """Make a batch with so many slots that the kernels get other sizes."""
    return several_slots(MANY_SLOTS)


BATCHES: list[Callable[[], FlatBatch]] = [one_slot, several_slots, many_slots]


def is_real(batch: FlatBatch) -> Any:
    """Return (T, 1): 0 at padding, whose gradients are zero in a step."""
    return (batch.dropout_positions > 0).to(DTYPE)[:, None]


def random(*shape: int, dtype: Any = DTYPE) -> Any:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(value: Any, exact: Any, tolerance: float = TOLERANCE) -> None:
    assert value.shape == exact.shape
    error = (value.float() - exact.float()).norm() / exact.float().norm()
    assert error <= tolerance, f"the difference is {float(error):.2e} of the norm"


def make_adapters(
    batch: FlatBatch,
    groups: list[list[AdaptedLayer]],
    rank: int,
    dtype: Any = torch.float32,
    eight_bit: bool = False,
    layer_ranks: dict[str, int] | None = None,
) -> tuple[Any, Any]:
    """Make adapters for the kernels, and the same for the reference in float32. All layers have scales of their own.

    Several slots have a rank each, and in the first slot some layers may have other ranks.
    """
    num_slots = len(batch.table["key"])
    ours, exact = (
        Adapters(groups, num_slots, rank, dtype, compute, DEVICE, eight_bit, EXPERT_RANK)
        for compute in (DTYPE, torch.float32)
    )
    for adapters in (ours, exact):
        adapters.set_patterns(0, layer_ranks or {}, {})
    ours.factors.uniform_(0.5, 2.0)
    exact.factors.copy_(ours.factors)
    ours.weights.normal_()
    batch.table["rank"].clamp_(max=rank)
    clear_beyond(ours, ours.weights)
    exact.weights.copy_(ours.weights)
    return ours, exact


def clear_beyond(adapters: Adapters, flat: Any) -> None:
    """Set to zero what lies beyond each slot's own ranks."""
    whole = flat.clone()
    flat.zero_()
    for slot in range(adapters.num_slots):
        own = min(RANKS[slot], adapters.rank) if adapters.num_slots > 1 else adapters.rank
        kept, before = (adapters.matrices(slot, own, each) for each in (flat, whole))
        for (_, matrix), (_, was) in zip(kept, before, strict=True):
            matrix.copy_(was)


GROUPS = {
    "three": [AdaptedLayer("q", 4, 72, 0, 40), AdaptedLayer("k", 5, 72, 40, 24), AdaptedLayer("v", 6, 72, 64, 24)],
    "two of three": [AdaptedLayer("q", 11, 72, 0, 40), AdaptedLayer("v", 13, 72, 64, 24)],
    "one, wide": [AdaptedLayer("down", 20, 200, 0, 330)],
}
