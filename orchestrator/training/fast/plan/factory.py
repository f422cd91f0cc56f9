"""Engines of this process: how they are held in memory, and the engines that stand on a base."""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from orchestrator.errors import TooLargeError
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.memory import (
    EVALUATION_TOKENS,
    GIB,
    MOST_TOKENS,
    BaseShape,
    MemoryOption,
    MemoryPrediction,
    memory_options,
    predict,
)
from orchestrator.training.fast.step.adapters import Adapters, padded_rank
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import CPU_TOKENS, Engine
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.fast.warmup import precompile
from orchestrator.training.model.precision import resolve_precision
from orchestrator.training.model.targets import expected_modules

CPU_FULL = 512
"""Tokens of a pass from which on a CPU is no faster a token: measured on the demo, docs/log.md."""

LONGEST_STEP = 64
"""Tokens: the longest sequence is rounded up to a multiple, so that a tile's filler is never longer."""

GRAPHS = True
"""Capture steps as CUDA graphs."""

MARGIN = 0.04
"""Of the GPU's memory, for fragments and what other libraries take."""


@dataclass(frozen=True)
class _CachedEngines:
    """What was built on a base."""

    about: tuple[Any, ...]
    decoder: Decoder
    pool: Any
    engines: dict[tuple[int | None, tuple[Any, ...]], Engine]
    """By the slot whose own it is (None for a joint one), and by what it is made for."""


_engines: WeakKeyDictionary[Any, _CachedEngines] = WeakKeyDictionary()
"""Engines live as long as their base, so that compiled kernels and graphs serve one trial after another."""


@dataclass(frozen=True)
class EngineSpec:
    """What all trials of an engine share."""

    num_slots: int
    rank: int
    """The largest; on a GPU padded."""
    modules: frozenset[str]
    """Names of all layers that any of them adapts."""
    precision: str
    adapter_dtype: str
    eight_bit: bool
    """The optimizer's moments."""
    keeps_base: bool | None
    """None where the memory decides, here and below."""
    recompute: bool | None
    max_rows: int
    """Of the largest batch."""
    reproducible: bool
    """Whether the figures of a trial must not depend on memory, nor on its neighbors. On a CPU they never do."""
    separate: bool = False
    """Whether each slot has an engine of its own, which steps by itself."""

    @classmethod
    def of(cls, base: Any, configs: Sequence[TrialConfig], num_slots: int, separate: bool = False) -> "EngineSpec":
        """The kind of these trials' engine; where they differ in what must be the same, it is the first one's."""
        training = configs[0].training
        rank = max(config.lora.rank for config in configs)
        return cls(
            num_slots,
            padded_rank(rank) if torch.cuda.is_available() else rank,
            frozenset(name for config in configs for name in expected_modules(base, config.lora)),
            resolve_precision(training),
            training.adapter_dtype,
            "8bit" in training.optimizer,
            None if training.dequantize == "auto" else training.dequantize == "once",
            None if training.recompute == "auto" else training.recompute,
            max(config.training.batch_size * config.training.accumulation for config in configs),
            training.reproducible and torch.cuda.is_available(),
            separate,
        )

    def refuses(self, base: Any, config: TrialConfig) -> str | None:
        """Why a trial, which the fast engine can hold, cannot be one of these; or None."""
        own = EngineSpec.of(base, [config], self.num_slots)
        for name, field in _FIELDS.items():
            if getattr(own, name) != getattr(self, name):
                return f"{field} is another than that of the trials beside it"
        if own.rank > self.rank or not own.modules <= self.modules:
            return "its rank or its layers are more than the slots were made for"
        return None


_FIELDS = {
    "precision": "training.precision",
    "adapter_dtype": "training.adapter_dtype",
    "eight_bit": "the precision of training.optimizer's moments",
    "keeps_base": "training.dequantize",
    "recompute": "training.recompute",
    "reproducible": "training.reproducible",
}


@dataclass(frozen=True)
class MemoryPlan:
    """How a trial is held on its device."""

    choice: MemoryOption
    predicted: MemoryPrediction | None = None
    """Peak on a GPU; None on a CPU."""
    measured: int | None = None
    """The same, from a step of the largest batch; bytes."""

    @property
    def measured_gib(self) -> float:
        """0 on a CPU."""
        return round((self.measured or 0) / GIB, 3)

    def record(self) -> dict[str, Any]:
        """For the trial's result."""
        record = asdict(self.choice)
        if self.predicted is not None:
            record |= {"predicted_gib": round(self.predicted.total / GIB, 3), "measured_gib": self.measured_gib}
        return record


def engine_for(
    base: Any,
    configs: Sequence[TrialConfig],
    train: TokenizedRows,
    held_out: TokenizedRows,
    num_slots: int = 1,
    too_large: MemoryOption | None = None,
) -> tuple[Engine, MemoryPlan]:
    """The engine for such trials, one that stands or a new one on this base, and how it is held.

    Args:
        base: the bare base.
        configs: the trials, or some that stand for them: the largest of each kind.
        train: rows to train on.
        held_out: rows to evaluate on.
        num_slots: trials at a time.
        too_large: has run out of memory in spite of the probe: what is chosen takes less.

    Raises:
        TooLargeError: they do not fit, whatever is given up.
    """
    kind, longest = EngineSpec.of(base, configs, num_slots), max(train.longest, held_out.longest)
    compute, on_gpu = getattr(torch, configs[0].base.compute_dtype), torch.cuda.is_available()
    for plan in feasible(base, kind, configs[0], train, held_out, too_large):
        if not on_gpu:
            return cached_engine(base, kind, compute, longest, plan.choice, on_gpu), plan
        # Once more if something else stood on the base: it may have been that.
        for _ in range(1 + (base in _engines)):
            sizes = pass_tokens(kind, train, plan.choice), evaluation_tokens(kind, held_out)
            if engine := _probed(base, kind, compute, longest, plan.choice, *sizes):
                return engine, replace(plan, measured=engine.peak_bytes)
            release(base)
    raise does_not_fit(kind, longest)


def feasible(
    base: Any,
    kind: EngineSpec,
    config: TrialConfig,
    train: TokenizedRows,
    held_out: TokenizedRows,
    too_large: MemoryOption | None = None,
) -> list[MemoryPlan]:
    """List the ways in which such an engine should fit into the memory of this process, the fastest first.

    Args:
        base: the bare base.
        kind: of the engine.
        config: one of its trials.
        train: rows to train on.
        held_out: rows to evaluate on.
        too_large: has run out of memory in spite of the probe: the choices listed take less.
    """
    longest, on_gpu = max(train.longest, held_out.longest), torch.cuda.is_available()
    options = memory_options(
        longest,
        pass_tokens(kind, train) if on_gpu else CPU_TOKENS,
        keeps_base=kind.keeps_base,
        recompute=kind.recompute,
        most_tokens=MOST_TOKENS if on_gpu else CPU_TOKENS,
    )
    if kind.reproducible:  # how a batch is split into passes changes its sums
        whole = max(choice.max_tokens for choice in options)
        options = [choice for choice in options if choice.max_tokens == whole]

    def predicted(choice: MemoryOption) -> MemoryPrediction:
        tokens = pass_tokens(kind, train, choice)
        return _predicted(BaseShape.of(base.config), kind, config, choice, tokens, evaluation_tokens(kind, held_out))

    if too_large is not None:
        most = predicted(too_large).total
        options = [choice for choice in options if predicted(choice).total < most]
    if not on_gpu:
        return [MemoryPlan(choice) for choice in options]
    budget = memory_budget()
    return [MemoryPlan(choice, memory) for choice in options if (memory := predicted(choice)).total <= budget]


def does_not_fit(kind: EngineSpec, longest: int) -> TooLargeError:
    """The error for trials that do not fit, whatever is given up."""
    held = f"{memory_budget() / GIB:.1f} GiB of GPU memory" if torch.cuda.is_available() else "this machine's memory"
    wish = " training.reproducible keeps batches whole: lower training.batch_size too." if kind.reproducible else ""
    return TooLargeError(
        f"{kind.num_slots} trials of rank {kind.rank} do not fit into {held}: their longest row has {longest} tokens",
        f"Lower data.max_length or lora.rank, or free training.dequantize and training.recompute (auto).{wish}",
    )


def compile_kernels(base: Any, configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Have the kernels compiled that such trials need on a GPU; the base need not be there, and one layer is enough.

    They depend on no number of tokens, nor on whether the base is kept dequantised; some do on the number of slots.
    """
    compute, choice = getattr(torch, configs[0].base.compute_dtype), MemoryOption(True, "nothing", MOST_TOKENS)
    separate = configs[0].training.reproducible
    for kind in separate_specs(base, configs) if separate else [EngineSpec.of(base, configs, num_slots)]:
        engine = cached_engine(base, kind, compute, LONGEST_STEP, choice, on_gpu=True)
        engine.compile(LONGEST_STEP, LONGEST_STEP)


def separate_specs(base: Any, configs: Sequence[TrialConfig]) -> list[EngineSpec]:
    """The kinds of engines of one slot that such trials may need, the largest first.

    Args:
        base: the bare base.
        configs: trials that stand for all: their ranks are the ends of the range, or all of it.
    """
    kinds = [EngineSpec.of(base, [config], 1) for config in configs]
    ranks = {kind.rank for kind in kinds}
    if torch.cuda.is_available():
        ranks = {1 << power for power in range(min(ranks).bit_length() - 1, max(ranks).bit_length())}
    # One of each that differs in what kernels are made for.
    different = {(kind.modules, kind.eight_bit, rank): replace(kind, rank=rank) for kind in kinds for rank in ranks}
    return sorted(different.values(), key=lambda kind: (kind.rank, len(kind.modules)), reverse=True)


def plan_slots(
    base: Any, configs: Sequence[TrialConfig], train: TokenizedRows, held_out: TokenizedRows, wanted: int
) -> tuple[int, str]:
    """How many trials should train at a time, and why. The arguments are those of `engine_for`.

    On a GPU it is the number whose tokens take least time each, by what fits into memory, and of equals the largest.
    """
    separate = steps_separately(configs[0])
    kinds = [EngineSpec.of(base, configs, count, separate) for count in range(1, wanted + 1)]
    if not torch.cuda.is_available():
        one = pass_tokens(kinds[0], train)
        count = min(wanted, -(-CPU_FULL // one))
        return count, f"a batch has up to {one} tokens, and a core is busy with {CPU_FULL}"
    times: dict[int, float] = {}
    for kind in kinds:
        if plans := feasible(base, kind, configs[0], train, held_out):
            times[kind.num_slots] = plans[0].choice.relative_time()
    gib = memory_budget() / GIB
    if not times:
        return 1, f"not even one fits into {gib:.0f} GiB of GPU memory"
    count = max(times, key=lambda slots: (-round(times[slots], 3), slots))
    limit = "more do not fit, or are no faster" if count < wanted else f"up to {MOST_TOKENS} tokens a pass"
    return count, f"{gib:.0f} GiB of GPU memory, {limit}"


def steps_separately(config: TrialConfig) -> bool:
    """Whether trials beside each other step one after another, each as it does alone, and so with the same bits.

    On a CPU they always do: a joint pass of the demo's trials saves no time there (docs/log.md).
    """
    return config.training.reproducible or not torch.cuda.is_available()


def pass_tokens(kind: EngineSpec, train: TokenizedRows, choice: MemoryOption | None = None) -> int:
    """Tokens that a pass should hold: one slot's largest batch, or what the batches of all have on average, and more.

    A batch that finds no room in a pass waits for the next.

    Args:
        kind: of the engine.
        train: rows to train on.
        choice: limits it.
    """
    largest = int(np.sort(train.lengths)[-kind.max_rows :].sum())
    if kind.num_slots > 1 and not kind.separate:
        typical = 1.1 * kind.num_slots * kind.max_rows * float(train.lengths.mean())
        largest = max(largest, int(typical))
    return largest if choice is None else min(largest, choice.max_tokens)


def evaluation_tokens(kind: EngineSpec, held_out: TokenizedRows) -> int:
    """Tokens of the largest pass of an evaluation."""
    together = 1 if kind.separate else kind.num_slots
    return min(int(held_out.lengths.sum()) * together, max(EVALUATION_TOKENS, held_out.longest))


def _predicted(
    shape: BaseShape, kind: EngineSpec, config: TrialConfig, choice: MemoryOption, tokens: int, evaluated: int
) -> MemoryPrediction:
    return predict(
        shape,
        choice,
        tokens,
        evaluated,
        kind.rank,
        {name.rpartition(".")[2] for name in kind.modules},
        num_slots=kind.num_slots,
        adapter_bytes=4 if kind.adapter_dtype == "float32" else 2,
        eight_bit=kind.eight_bit,
        quantised=config.base.quantization != "none",
        double_quant=config.base.double_quant,
    )


def _probed(
    base: Any, kind: EngineSpec, compute: torch.dtype, longest: int, choice: MemoryOption, tokens: int, evaluated: int
) -> Engine | None:
    """An engine that has run its largest step, or None if there was not the memory for it."""
    try:
        engine = cached_engine(base, kind, compute, longest, choice, on_gpu=True)
        precompile.join()
        engine.probe(tokens, evaluated)
    except torch.OutOfMemoryError:
        return None
    return engine


def release(base: Any) -> None:
    """Free what stands on a base."""
    if _engines.pop(base, None) is not None:
        gc.collect()
        torch.cuda.empty_cache()


def cached_engine(
    base: Any,
    kind: EngineSpec,
    compute: torch.dtype,
    longest: int,
    choice: MemoryOption,
    on_gpu: bool,
    slot: int | None = None,
) -> Engine:
    """An engine on this base, of this kind; the one that stands is kept, its graphs included.

    Args:
        base: the bare base.
        kind: of the engine.
        compute: type of the base's products.
        longest: tokens of the longest row.
        choice: how it is held.
        on_gpu: whether it is for a GPU.
        slot: whose own it is, in place of the one that the slot had; None for a joint one.
    """
    device = base.get_input_embeddings().weight.device
    adapter_dtype = getattr(torch, kind.adapter_dtype)
    lora_dtype = torch.bfloat16 if kind.precision == "bf16" else adapter_dtype
    longest += -longest % LONGEST_STEP
    about_base = (compute, longest, choice.keeps_base)
    standing = _engines.get(base)
    if standing is None or standing.about != about_base:  # one form of the base at a time
        release(base)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and GRAPHS else None
        standing = _engines[base] = _CachedEngines(about_base, Decoder(base, *about_base), pool, {})
    about = (kind.num_slots, kind.rank, adapter_dtype, kind.eight_bit, lora_dtype, kind.modules, choice.recompute)
    if (slot, about) not in standing.engines:
        if slot is not None:
            for earlier in [key for key in standing.engines if key[0] == slot]:
                del standing.engines[earlier]
        adapted = adapted_layers(base, kind.modules)
        adapters = Adapters(adapted, kind.num_slots, kind.rank, adapter_dtype, lora_dtype, device, kind.eight_bit)
        standing.engines[slot, about] = Engine(standing.decoder, adapters, choice.recompute, standing.pool, on_gpu)
    engine = standing.engines[slot, about]
    engine.max_tokens = choice.max_tokens
    return engine


def memory_budget() -> int:
    """Bytes of GPU memory that this process may hold: others may have taken some."""
    free, total = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - MARGIN * total)
