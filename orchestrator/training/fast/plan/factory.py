"""Builds engines, and caches them on their base so that one trial after another uses the same kernels and graphs."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.engine_spec import EngineSpec, separate_specs
from orchestrator.training.fast.plan.memory import MAX_PASS_TOKENS, MemoryOption
from orchestrator.training.fast.shard.base import sharded
from orchestrator.training.fast.sizes import LONGEST_STEP
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine

GRAPHS = True
"""Whether steps are captured as CUDA graphs."""


@dataclass(frozen=True)
class _CachedEngines:
    """The engines of one base, and the decoder that they share."""

    key: tuple[Any, ...]
    """Arguments of the decoder."""
    decoder: Decoder
    graph_pool: Any
    engines: dict[tuple[int | None, tuple[Any, ...]], Engine]
    """(slot that owns the engine, or None for a joint one; what the engine was built for) -> engine."""


_engines: WeakKeyDictionary[Any, _CachedEngines] = WeakKeyDictionary()
"""Base -> its engines, which live as long as the base."""


def cached_engine(
    base: Any,
    spec: EngineSpec,
    compute: torch.dtype,
    longest: int,
    option: MemoryOption,
    on_gpu: bool,
    slot: int | None = None,
) -> Engine:
    """Return the engine of this description on a base: the cached one with its CUDA graphs, or a new one.

    A base is kept in one form at a time: another dtype, a longer row or another `keeps_base` evicts its engines.

    Args:
        base: the base without adapters.
        spec: the engine.
        compute: dtype of the base's products.
        longest: tokens of the longest row.
        option: how the engine is held.
        on_gpu: whether the engine is for a GPU.
        slot: the slot that owns the engine; it replaces that slot's earlier engine. None for a joint engine.
    """
    device = base.get_input_embeddings().weight.device
    adapter_dtype = getattr(torch, spec.adapter_dtype)
    lora_dtype = torch.bfloat16 if spec.precision == "bf16" else adapter_dtype
    longest += -longest % LONGEST_STEP
    decoder_key = (compute, longest, option.keeps_base)
    cached = _engines.get(base)
    if cached is None or cached.key != decoder_key:
        release(base)
        # The gathers of a base in pieces are not captured: each process has buckets of its own, and would wait in a
        # graph for a collective that the others make for another pass.
        has_graphs = device.type == "cuda" and GRAPHS and sharded(base) is None
        pool = torch.cuda.graph_pool_handle() if has_graphs else None
        cached = _engines[base] = _CachedEngines(decoder_key, Decoder(base, *decoder_key), pool, {})
    ranks = spec.rank, spec.expert_rank
    key = (spec.num_slots, ranks, adapter_dtype, spec.eight_bit, lora_dtype, spec.modules, option.recompute)
    if (slot, key) not in cached.engines:
        if slot is not None:
            for earlier in [each for each in cached.engines if each[0] == slot]:
                del cached.engines[earlier]
        adapted = adapted_layers(base, spec.modules)
        adapters = Adapters(
            adapted, spec.num_slots, spec.rank, adapter_dtype, lora_dtype, device, spec.eight_bit, spec.expert_rank
        )
        cached.engines[slot, key] = Engine(cached.decoder, adapters, option.recompute, cached.graph_pool, on_gpu)
    engine = cached.engines[slot, key]
    engine.max_tokens = option.max_tokens
    return engine


def is_cached(base: Any) -> bool:
    """Return whether any engine of a base is cached."""
    return base in _engines


def release(base: Any) -> None:
    """Evict the engines of a base and free their GPU memory."""
    if _engines.pop(base, None) is not None:
        gc.collect()
        torch.cuda.empty_cache()


def compile_kernels(base: Any, configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Compile the kernels that trials need on a GPU.

    Kernels depend neither on the number of tokens nor on whether the dequantized base is kept; some depend on the
    number of slots.

    Args:
        base: a base without adapters. One layer without weights is enough.
        configs: trials that represent all others.
        num_slots: trials at a time.
    """
    compute, option = getattr(torch, configs[0].base.compute_dtype), MemoryOption(True, "nothing", MAX_PASS_TOKENS)
    separate = configs[0].training.reproducible
    for spec in separate_specs(base, configs) if separate else [EngineSpec.of(base, configs, num_slots)]:
        engine = cached_engine(base, spec, compute, LONGEST_STEP, option, on_gpu=True)
        engine.compile(LONGEST_STEP, LONGEST_STEP)
