"""Which trials the fast engine holds, and the engine of this process."""

import gc
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.decoder import GROUPS, Decoder, adapted_layers, unknown_shape
from orchestrator.training.fast.engine import CPU_TOKENS, Engine
from orchestrator.training.fast.lora import Adapters, padded_rank
from orchestrator.training.fast.row import Rows
from orchestrator.training.memory import EVALUATION_TOKENS, GIB, BaseShape, Choice, Memory, choices, predict
from orchestrator.training.precision import resolve_precision

MOST_TOKENS = 8192
"""Of one pass: longer ones are no faster."""

LONGEST_STEP = 64
"""Tokens: the longest sequence is rounded up to a multiple, so that a tile's filler is never longer."""

MAX_RANK, MAX_HEAD = 256, 128
"""What the kernels' blocks hold in the memory of a multiprocessor."""

MAX_ELEMENTS = 2**31
"""Of one tensor: the kernels count in 32 bits."""

GRAPHS = True
"""Capture steps as CUDA graphs."""

MARGIN = 0.04
"""Of the GPU's memory, for fragments and what other libraries take."""


@dataclass(frozen=True)
class _Standing:
    """What was built on a base."""

    about: tuple[Any, ...]
    decoder: Decoder
    pool: Any
    engines: dict[tuple[Any, ...], Engine]


_engines: WeakKeyDictionary[Any, _Standing] = WeakKeyDictionary()
"""Engines live as long as their base, so that compiled kernels and graphs serve one trial after another."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a trial is held on its device."""

    choice: Choice
    predicted: Memory | None = None
    """Peak on a GPU; None on a CPU."""
    measured: int | None = None
    """The same, from a step of the largest batch; bytes."""

    def record(self) -> dict[str, Any]:
        """For the trial's result."""
        record = asdict(self.choice)
        if self.predicted is not None and self.measured is not None:
            record["predicted_gib"] = round(self.predicted.total / GIB, 3)
            record["measured_gib"] = round(self.measured / GIB, 3)
        return record


def why_not(config: TrialConfig, base: Any, modules: Collection[str], longest: int) -> str | None:
    """Why the fast engine cannot hold this trial, or None.

    Args:
        config: the trial.
        base: the bare base.
        modules: names of the layers to adapt.
        longest: tokens of the longest row.
    """
    if reason := config.why_not_fast():
        return reason
    if reason := unknown_shape(base, longest):
        return reason
    known = {name for names in GROUPS for name in names}
    if others := sorted({name.rpartition(".")[2] for name in modules} - known):
        return f"an adapter on {', '.join(others)}"
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1:
        return f"a base on {len(devices)} devices"
    precision, dtype = resolve_precision(config.training), config.base.compute_dtype
    if (precision == "bf16" and dtype != "bfloat16") or dtype == "float16":
        return f"base.compute_dtype {dtype} under precision {precision}"
    if torch.cuda.is_available():
        if precision != "bf16":
            return f"precision {precision} on a GPU"
        shape = BaseShape.of(base.config)
        if shape.head_size not in (16, 32, 64, MAX_HEAD):
            return f"heads of {shape.head_size} features on a GPU (its kernels take 16, 32, 64 and {MAX_HEAD})"
        if config.lora.rank > MAX_RANK:
            return f"a rank over {MAX_RANK} on a GPU"
        adapter = padded_rank(config.lora.rank) * sum(sum(shape.linears[name.rpartition(".")[2]]) for name in modules)
        if max(adapter, max(longest, MOST_TOKENS) * 2 * shape.inner) >= MAX_ELEMENTS:
            return "tensors of 2**31 elements and more"
    return None


def engine_for(
    base: Any, config: TrialConfig, modules: Collection[str], train: Rows, held_out: Rows, sharing: int = 1
) -> tuple[Engine, MemoryPlan]:
    """The engine for this trial, one that stands or a new one on this base, and how it is held.

    Args:
        config: the trial.
        base: the bare base.
        modules: names of the layers to adapt.
        train: rows to train on.
        held_out: rows to evaluate on.
        sharing: processes that share the GPU, this one included.

    Raises:
        TrialError: the trial does not fit on the GPU, whatever is given up.
    """
    training = config.training
    longest = max(train.longest, held_out.longest)
    keeps_base = None if training.dequantise == "auto" else training.dequantise == "once"
    recompute = None if training.recompute == "auto" else training.recompute
    if not torch.cuda.is_available():
        choice = Choice(keeps_base is not False, "layers" if recompute else "nothing", CPU_TOKENS)
        return _engine(base, config, modules, longest, choice), MemoryPlan(choice)
    rows = training.batch_size * training.accumulation
    largest = int(np.sort(train.lengths)[-rows:].sum())
    evaluated = min(int(held_out.lengths.sum()), max(EVALUATION_TOKENS, held_out.longest))
    budget = _budget(sharing)
    for choice in choices(longest, largest, keeps_base=keeps_base, recompute=recompute, most_tokens=MOST_TOKENS):
        tokens = min(largest, choice.max_tokens)
        predicted = predict(
            BaseShape.of(base.config),
            choice,
            tokens,
            evaluated,
            padded_rank(config.lora.rank),
            {name.rpartition(".")[2] for name in modules},
            adapter_bytes=4 if training.adapter_dtype == "float32" else 2,
            quantised=config.base.quantization != "none",
            double_quant=config.base.double_quant,
        )
        if predicted.total > budget:
            continue
        # Once more if something else stood on the base: it may have been that.
        for _ in range(1 + (base in _engines)):
            if engine := _probed(base, config, modules, longest, choice, tokens, evaluated):
                return engine, MemoryPlan(choice, predicted, engine.peak_bytes)
            release(base)
    raise TrialError(
        f"the trial does not fit into {budget / GIB:.1f} GiB of GPU memory: its longest row has {longest} tokens, its"
        f" rank is {config.lora.rank}",
        "Lower data.max_length or lora.rank, or free training.dequantise and training.recompute (auto).",
    )


def _probed(
    base: Any, config: TrialConfig, modules: Collection[str], longest: int, choice: Choice, tokens: int, evaluated: int
) -> Engine | None:
    """An engine that has run its largest step, or None if there was not the memory for it."""
    try:
        engine = _engine(base, config, modules, longest, choice)
        engine.probe(tokens, evaluated)
    except torch.OutOfMemoryError:
        return None
    return engine


def release(base: Any) -> None:
    """Free what stands on a base."""
    if _engines.pop(base, None) is not None:
        gc.collect()
        torch.cuda.empty_cache()


def _engine(base: Any, config: TrialConfig, modules: Collection[str], longest: int, choice: Choice) -> Engine:
    """An engine on this base, of this kind: what stands already is kept, graphs included."""
    device = base.get_input_embeddings().weight.device
    on_gpu = device.type == "cuda"
    adapter_dtype = getattr(torch, config.training.adapter_dtype)
    lora_dtype = torch.bfloat16 if resolve_precision(config.training) == "bf16" else adapter_dtype
    rank = padded_rank(config.lora.rank) if on_gpu else config.lora.rank
    longest += -longest % LONGEST_STEP
    about_base = (getattr(torch, config.base.compute_dtype), longest, choice.keeps_base)
    standing = _engines.get(base)
    if standing is None or standing.about != about_base:  # one form of the base at a time
        release(base)
        pool = torch.cuda.graph_pool_handle() if on_gpu and GRAPHS else None
        standing = _engines[base] = _Standing(about_base, Decoder(base, *about_base), pool, {})
    about = (rank, adapter_dtype, lora_dtype, frozenset(modules), choice.recompute)
    if about not in standing.engines:
        adapters = Adapters(adapted_layers(base, modules), 1, rank, adapter_dtype, lora_dtype, device)
        standing.engines[about] = Engine(standing.decoder, adapters, choice.recompute, standing.pool)
    engine = standing.engines[about]
    engine.max_tokens = choice.max_tokens
    return engine


def _budget(sharing: int) -> int:
    """Bytes of GPU memory that this process may hold: its share, of which others may have taken some."""
    free, total = torch.cuda.mem_get_info()
    return int(min(free + torch.cuda.memory_reserved(), total / sharing) - MARGIN * total)
