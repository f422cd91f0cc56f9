"""Which trials the fast engine holds, and the engine of this process."""

import gc
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from orchestrator.errors import TooLargeError
from orchestrator.spec import TrialConfig
from orchestrator.training.expected import expected_modules
from orchestrator.training.fast import ahead
from orchestrator.training.fast.decoder import GROUPS, Decoder, adapted_layers, unknown_shape
from orchestrator.training.fast.engine import CPU_TOKENS, Engine
from orchestrator.training.fast.lora import Adapters, padded_rank
from orchestrator.training.fast.row import Rows
from orchestrator.training.memory import EVALUATION_TOKENS, GIB, BaseShape, Choice, Memory, choices, predict
from orchestrator.training.precision import resolve_precision

MOST_TOKENS = 16384
"""Of one pass: longer ones are no faster."""

CPU_FULL = 512
"""Tokens of a pass from which on a CPU is no faster a token: measured on the demo, docs/log.md."""

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
class Kind:
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

    @classmethod
    def of(cls, base: Any, configs: Sequence[TrialConfig], num_slots: int) -> "Kind":
        """For these trials; where they differ in what must be the same, it is the first one's."""
        training = configs[0].training
        rank = max(config.lora.rank for config in configs)
        return cls(
            num_slots,
            padded_rank(rank) if torch.cuda.is_available() else rank,
            frozenset(name for config in configs for name in expected_modules(base, config.lora)),
            resolve_precision(training),
            training.adapter_dtype,
            "8bit" in training.optimizer,
            None if training.dequantise == "auto" else training.dequantise == "once",
            None if training.recompute == "auto" else training.recompute,
            max(config.training.batch_size * config.training.accumulation for config in configs),
        )

    def refuses(self, base: Any, config: TrialConfig) -> str | None:
        """Why a trial, which the fast engine can hold, cannot be one of these; or None."""
        own = Kind.of(base, [config], self.num_slots)
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
    "keeps_base": "training.dequantise",
    "recompute": "training.recompute",
}


@dataclass(frozen=True)
class MemoryPlan:
    """How a trial is held on its device."""

    choice: Choice
    predicted: Memory | None = None
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


def why_not(config: TrialConfig, base: Any, longest: int) -> str | None:
    """Why the fast engine cannot hold this trial, or None.

    Args:
        config: the trial.
        base: the bare base.
        longest: tokens of the longest row.
    """
    if reason := config.why_not_fast():
        return reason
    modules = expected_modules(base, config.lora)
    if reason := unknown_shape(base, longest):
        return reason
    known = {name for names in GROUPS for name in names}
    if others := sorted({name.rpartition(".")[2] for name in modules} - known):
        return f"an adapter on {', '.join(others)}"
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1:
        return f"a base on {len(devices)} devices"
    return why_not_by_shape(config, BaseShape.of(base.config), modules, longest, torch.cuda.is_available())


def why_not_by_shape(
    config: TrialConfig, shape: BaseShape, modules: Collection[str], longest: int, on_gpu: bool
) -> str | None:
    """The part of `why_not` for which the base need not be there.

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


def engine_for(
    base: Any,
    configs: Sequence[TrialConfig],
    train: Rows,
    held_out: Rows,
    num_slots: int = 1,
    too_large: Choice | None = None,
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
    kind, longest = Kind.of(base, configs, num_slots), max(train.longest, held_out.longest)
    compute = getattr(torch, configs[0].base.compute_dtype)
    largest, on_gpu = pass_tokens(kind, train), torch.cuda.is_available()
    evaluated = min(int(held_out.lengths.sum()) * num_slots, max(EVALUATION_TOKENS, held_out.longest))

    def predicted(choice: Choice) -> Memory:
        tokens = min(largest, choice.max_tokens)
        return _predicted(BaseShape.of(base.config), kind, configs[0], choice, tokens, evaluated)

    options = choices(
        longest,
        largest if on_gpu else CPU_TOKENS,
        keeps_base=kind.keeps_base,
        recompute=kind.recompute,
        most_tokens=MOST_TOKENS if on_gpu else CPU_TOKENS,
    )
    if too_large is not None:
        most = predicted(too_large).total
        options = [choice for choice in options if predicted(choice).total < most]
    if not on_gpu and options:
        return _engine(base, kind, compute, longest, options[0], on_gpu), MemoryPlan(options[0])
    budget = _budget() if on_gpu else 0
    for choice in options:
        if predicted(choice).total > budget:
            continue
        # Once more if something else stood on the base: it may have been that.
        for _ in range(1 + (base in _engines)):
            if engine := _probed(base, kind, compute, longest, choice, min(largest, choice.max_tokens), evaluated):
                return engine, MemoryPlan(choice, predicted(choice), engine.peak_bytes)
            release(base)
    held = f"{budget / GIB:.1f} GiB of GPU memory" if on_gpu else "this machine's memory"
    raise TooLargeError(
        f"{num_slots} trials of rank {kind.rank} do not fit into {held}: their longest row has {longest} tokens",
        "Lower data.max_length or lora.rank, or free training.dequantise and training.recompute (auto).",
    )


def compile_kernels(base: Any, configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Have the kernels compiled that such trials need on a GPU; the base need not be there, and one layer is enough.

    They depend on no number of tokens, nor on whether the base is kept dequantised; some do on the number of slots.
    """
    kind, compute = Kind.of(base, configs, num_slots), getattr(torch, configs[0].base.compute_dtype)
    choice = Choice(True, "nothing", MOST_TOKENS)
    _engine(base, kind, compute, LONGEST_STEP, choice, on_gpu=True).compile(LONGEST_STEP, LONGEST_STEP)


def plan_slots(base: Any, configs: Sequence[TrialConfig], train: Rows, held_out: Rows, wanted: int) -> tuple[int, str]:
    """How many trials should train at a time, and why. The arguments are those of `engine_for`.

    On a GPU it is the number whose tokens take least time each, by what fits into memory, and of equals the largest.
    """
    kinds = [Kind.of(base, configs, count) for count in range(1, wanted + 1)]
    if not torch.cuda.is_available():
        one = pass_tokens(kinds[0], train)
        count = min(wanted, -(-CPU_FULL // one))
        return count, f"a batch has up to {one} tokens, and a core is busy with {CPU_FULL}"
    budget, shape, longest = _budget(), BaseShape.of(base.config), max(train.longest, held_out.longest)
    times: dict[int, float] = {}
    for kind in kinds:
        largest = pass_tokens(kind, train)
        for choice in choices(
            longest, largest, keeps_base=kind.keeps_base, recompute=kind.recompute, most_tokens=MOST_TOKENS
        ):
            tokens = min(largest, choice.max_tokens)
            if _predicted(shape, kind, configs[0], choice, tokens, EVALUATION_TOKENS).total <= budget:
                times[kind.num_slots] = choice.relative_time()
                break
    if not times:
        return 1, f"not even one fits into {budget / GIB:.0f} GiB of GPU memory"
    count = max(times, key=lambda slots: (-round(times[slots], 3), slots))
    limit = "more do not fit, or are no faster" if count < wanted else f"up to {MOST_TOKENS} tokens a pass"
    return count, f"{budget / GIB:.0f} GiB of GPU memory, {limit}"


def pass_tokens(kind: Kind, train: Rows) -> int:
    """Tokens that a pass should hold: one slot's largest batch, or what the batches of all have on average, and more.

    A batch that finds no room in a pass waits for the next.
    """
    largest = int(np.sort(train.lengths)[-kind.max_rows :].sum())
    typical = 1.1 * kind.num_slots * kind.max_rows * float(train.lengths.mean())
    return largest if kind.num_slots == 1 else max(largest, int(typical))


def _predicted(
    shape: BaseShape, kind: Kind, config: TrialConfig, choice: Choice, tokens: int, evaluated: int
) -> Memory:
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
    base: Any, kind: Kind, compute: torch.dtype, longest: int, choice: Choice, tokens: int, evaluated: int
) -> Engine | None:
    """An engine that has run its largest step, or None if there was not the memory for it."""
    try:
        engine = _engine(base, kind, compute, longest, choice, on_gpu=True)
        ahead.join()
        engine.probe(tokens, evaluated)
    except torch.OutOfMemoryError:
        return None
    return engine


def release(base: Any) -> None:
    """Free what stands on a base."""
    if _engines.pop(base, None) is not None:
        gc.collect()
        torch.cuda.empty_cache()


def _engine(base: Any, kind: Kind, compute: torch.dtype, longest: int, choice: Choice, on_gpu: bool) -> Engine:
    """An engine on this base, of this kind: what stands already is kept, graphs included."""
    device = base.get_input_embeddings().weight.device
    adapter_dtype = getattr(torch, kind.adapter_dtype)
    lora_dtype = torch.bfloat16 if kind.precision == "bf16" else adapter_dtype
    longest += -longest % LONGEST_STEP
    about_base = (compute, longest, choice.keeps_base)
    standing = _engines.get(base)
    if standing is None or standing.about != about_base:  # one form of the base at a time
        release(base)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and GRAPHS else None
        standing = _engines[base] = _Standing(about_base, Decoder(base, *about_base), pool, {})
    about = (kind.num_slots, kind.rank, adapter_dtype, kind.eight_bit, lora_dtype, kind.modules, choice.recompute)
    if about not in standing.engines:
        adapted = adapted_layers(base, kind.modules)
        adapters = Adapters(adapted, kind.num_slots, kind.rank, adapter_dtype, lora_dtype, device, kind.eight_bit)
        standing.engines[about] = Engine(standing.decoder, adapters, choice.recompute, standing.pool, on_gpu)
    engine = standing.engines[about]
    engine.max_tokens = choice.max_tokens
    return engine


def _budget() -> int:
    """Bytes of GPU memory that this process may hold: others may have taken some."""
    free, total = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - MARGIN * total)
