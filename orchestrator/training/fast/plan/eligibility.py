"""Which trials the fast engine holds: by their configuration, their base, and what its kernels are made for."""

from collections.abc import Collection
from typing import Any

import torch

from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.memory import MOST_TOKENS, BaseShape
from orchestrator.training.fast.step.adapters import padded_rank
from orchestrator.training.fast.step.decoder import GROUPS, unsupported_shape
from orchestrator.training.model.precision import resolve_precision
from orchestrator.training.model.targets import expected_modules

MAX_RANK, MAX_HEAD = 256, 128
"""The largest rank and head size whose blocks fit into the shared memory of a multiprocessor."""

MAX_ELEMENTS = 2**31
"""Elements of one tensor: the kernels index in 32 bits."""


def unsupported_reason(config: TrialConfig, base: Any, longest: int) -> str | None:
    """Why the fast engine cannot hold this trial, or None where it can.

    Args:
        config: the trial.
        base: the bare base.
        longest: tokens of the longest row.
    """
    if reason := config.fast_unsupported_reason():
        return reason
    modules = expected_modules(base, config.lora)
    if reason := unsupported_shape(base, longest):
        return reason
    known = {name for names in GROUPS for name in names}
    if others := sorted({name.rpartition(".")[2] for name in modules} - known):
        return f"an adapter on {', '.join(others)}"
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1:
        return f"a base on {len(devices)} devices"
    return unsupported_reason_by_shape(config, BaseShape.of(base.config), modules, longest, torch.cuda.is_available())


def unsupported_reason_by_shape(
    config: TrialConfig, shape: BaseShape, modules: Collection[str], longest: int, on_gpu: bool
) -> str | None:
    """The part of `unsupported_reason` for which the base need not be there.

    Args:
        config: the trial.
        shape: of the base.
        modules: that it adapts.
        longest: tokens of the longest row.
        on_gpu: whether it is to be on one.
    """
    precision, dtype = resolve_precision(config.training), config.base.compute_dtype
    if (precision == "bf16" and dtype != "bfloat16") or dtype == "float16":
        return f"base.compute_dtype {dtype} under precision {precision}"
    if on_gpu:
        if precision != "bf16":
            return f"precision {precision} on a GPU"
        if shape.head_size not in (16, 32, 64, MAX_HEAD):
            return f"heads of {shape.head_size} features on a GPU (its kernels take 16, 32, 64 and {MAX_HEAD})"
        if config.lora.rank > MAX_RANK:
            return f"a rank over {MAX_RANK} on a GPU"
        adapter = padded_rank(config.lora.rank) * sum(sum(shape.linears[name.rpartition(".")[2]]) for name in modules)
        if max(adapter, max(longest, MOST_TOKENS) * 2 * shape.inner) >= MAX_ELEMENTS:
            return "tensors of 2**31 elements and more"
    return None
