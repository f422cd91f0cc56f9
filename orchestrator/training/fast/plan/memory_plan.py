"""Chooses how trials are held in the memory of this process, or of a GPU, and how many train together."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from orchestrator.base_size import BaseSize
from orchestrator.errors import TooLargeError
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.families.base_shape import BaseShape, adapted_part
from orchestrator.training.fast.families.text_model import text_config
from orchestrator.training.fast.plan.engine_spec import EngineSpec, evaluation_tokens, pass_tokens
from orchestrator.training.fast.plan.memory import (
    GIB,
    MAX_PASS_TOKENS,
    MemoryOption,
    MemoryPrediction,
    memory_options,
    predict,
)
from orchestrator.training.fast.shard.base import sharded
from orchestrator.training.fast.step.engine import CPU_TOKENS
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.words import counted

CPU_FULL = 512
"""Tokens of a pass beyond which a token takes no less time on a CPU: measured with the demo, docs/log.md."""

MARGIN = 0.04
"""Fraction of the GPU's memory that is left for fragmentation and for other libraries."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a trial is held on its device."""

    option: MemoryOption
    predicted: MemoryPrediction | None = None
    """Peak on a GPU; None on a CPU."""
    measured: int | None = None
    """Peak in bytes, measured in a step of the largest batch; None on a CPU."""

    @property
    def measured_gib(self) -> float:
        """Measured peak in GiB; 0 on a CPU."""
        return round((self.measured or 0) / GIB, 3)

    def record(self) -> dict[str, Any]:
        """Return what the trial's result records."""
        record = asdict(self.option)
        if self.predicted is not None:
            record |= {"predicted_gib": round(self.predicted.total / GIB, 3), "measured_gib": self.measured_gib}
        return record


@dataclass(frozen=True)
class Target:
    """The base and the device for which engines are planned: those of this process, or foreseen ones."""

    shape: BaseShape
    base_bytes: int
    """The base as loaded. It counts layers that are left out of quantization, and towers that text skips."""
    budget: int | None
    """Bytes of GPU memory that trials may use; None on a CPU."""
    is_sharded: bool = False
    """Whether this process holds one piece of the base, so that nothing dequantized can be kept."""

    @classmethod
    def here(cls, base: Any) -> "Target":
        """Describe a loaded base and the device of this process."""
        budget = memory_budget() if torch.cuda.is_available() else None
        shape, pieces = BaseShape.of(text_config(base.config)), sharded(base)
        if pieces is not None:
            return cls(shape, pieces.num_bytes, budget, is_sharded=True)
        return cls(shape, BaseSize.of(base).num_bytes, budget)


def feasible_plans(
    target: Target,
    spec: EngineSpec,
    config: TrialConfig,
    train: TokenizedRows,
    held_out: TokenizedRows,
    too_large: MemoryOption | None = None,
) -> list[MemoryPlan]:
    """List the ways to hold an engine that should fit into a device's memory, the fastest first.

    Args:
        target: the base and the device.
        spec: the engine.
        config: one of its trials.
        train: rows to train on.
        held_out: rows to evaluate on.
        too_large: an option that ran out of memory although its probe had succeeded. All plans need less.
    """
    options, predicted = _options(target, spec, config, train, held_out)
    if too_large is not None:
        limit = predicted(too_large).total
        options = [option for option in options if predicted(option).total < limit]
    if target.budget is None:
        return [MemoryPlan(option) for option in options]
    return [MemoryPlan(option, memory) for option in options if (memory := predicted(option)).total <= target.budget]


def smallest_plan(
    target: Target, spec: EngineSpec, config: TrialConfig, train: TokenizedRows, held_out: TokenizedRows
) -> MemoryPlan:
    """Return the way to hold an engine that takes the least GPU memory, whether it fits or not.

    The arguments are those of `feasible_plans`.
    """
    options, predicted = _options(target, spec, config, train, held_out)
    plans = [MemoryPlan(option, predicted(option)) for option in options]
    return min(plans, key=lambda plan: 0 if plan.predicted is None else plan.predicted.total)


def _options(
    target: Target, spec: EngineSpec, config: TrialConfig, train: TokenizedRows, held_out: TokenizedRows
) -> tuple[list[MemoryOption], Callable[[MemoryOption], MemoryPrediction]]:
    """Return the ways to hold an engine, the fastest first, and a function that predicts the memory of one."""
    longest, on_gpu, shape = max(train.longest, held_out.longest), target.budget is not None, target.shape
    options = memory_options(
        shape,
        longest,
        pass_tokens(spec, train) if on_gpu else CPU_TOKENS,
        keeps_base=False if target.is_sharded else spec.keeps_base,
        recompute=spec.recompute,
        max_pass_tokens=MAX_PASS_TOKENS if on_gpu else CPU_TOKENS,
    )
    if spec.reproducible:  # how a batch is split into passes changes its sums
        whole = max(option.max_tokens for option in options)
        options = [option for option in options if option.max_tokens == whole]

    def predicted(option: MemoryOption) -> MemoryPrediction:
        tokens = pass_tokens(spec, train, option)
        prediction = _predicted(shape, spec, config, option, tokens, evaluation_tokens(spec, held_out))
        return replace(prediction, base=target.base_bytes)

    return options, predicted


def too_large_error(spec: EngineSpec, longest: int, too_large: MemoryOption | None = None) -> TooLargeError:
    """Return the error for trials that do not fit into memory with any option.

    Args:
        spec: the engine.
        longest: tokens of the longest row.
        too_large: the option that ran out of memory before, if one did. Only options that need less were tried.
    """
    memory = f"{memory_budget() / GIB:.1f} GiB of GPU memory" if torch.cuda.is_available() else "this machine's memory"
    hint = " training.reproducible keeps batches whole: lower training.batch_size too." if spec.reproducible else ""
    trials = f"{counted(spec.num_slots, 'trial')} of rank {spec.rank} with rows of up to {longest} tokens"
    message = f"{trials} do not fit into {memory}"
    if too_large is not None:
        message = (
            f"{trials} ran out of memory with recompute={too_large.recompute} and passes of {too_large.max_tokens} "
            f"tokens, and nothing smaller fits into {memory}"
        )
    return TooLargeError(
        message,
        f"Lower data.max_length or lora.rank, or set training.dequantize and training.recompute to auto.{hint}",
    )


def plan_slots(
    target: Target,
    base: Any,
    configs: Sequence[TrialConfig],
    train: TokenizedRows,
    held_out: TokenizedRows,
    wanted: int,
) -> tuple[int, str]:
    """Choose how many trials train together on a device, and say why.

    On a GPU it is the number with the least predicted time a token among those that fit into memory; the largest such
    number where several take the same time.

    Args:
        target: the base and the device.
        base: the base without adapters; its weights are not read.
        configs: trials that represent all others.
        train: rows to train on.
        held_out: rows to evaluate on.
        wanted: upper bound.

    Returns:
        The number, and the reason for it.
    """
    on_gpu = target.budget is not None
    separate = configs[0].training.reproducible or not on_gpu
    specs = [EngineSpec.of(base, configs, count, separate, on_gpu) for count in range(1, wanted + 1)]
    if target.budget is None:
        one = pass_tokens(specs[0], train)
        count = min(wanted, -(-CPU_FULL // one))
        return count, f"a batch has up to {one} tokens, and {CPU_FULL} tokens keep a core busy"
    times: dict[int, float] = {}
    for spec in specs:
        if plans := feasible_plans(target, spec, configs[0], train, held_out):
            times[spec.num_slots] = plans[0].option.relative_time(target.shape)
    gib = target.budget / GIB
    if not times:
        return 1, f"not even one fits into {gib:.0f} GiB of GPU memory"
    count = max(times, key=lambda slots: (-round(times[slots], 3), slots))
    limit = "more do not fit, or are no faster" if count < wanted else f"up to {MAX_PASS_TOKENS} tokens a pass"
    return count, f"{gib:.0f} GiB of GPU memory, {limit}"


def steps_separately(config: TrialConfig) -> bool:
    """Return whether trials of one process step one after another, each with the same bits as when it trains alone.

    On a CPU they always do: a joint pass of the demo's trials saves no time there (docs/log.md).
    """
    return config.training.reproducible or not torch.cuda.is_available()


def memory_budget() -> int:
    """Return the bytes of GPU memory that this process may use, apart from what other processes hold."""
    free, total = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - MARGIN * total)


def _predicted(
    shape: BaseShape, spec: EngineSpec, config: TrialConfig, option: MemoryOption, tokens: int, evaluated: int
) -> MemoryPrediction:
    return predict(
        shape,
        option,
        tokens,
        evaluated,
        spec.rank,
        {adapted_part(name) for name in spec.modules},
        expert_rank=spec.expert_rank,
        num_slots=spec.num_slots,
        adapter_bytes=4 if spec.adapter_dtype == "float32" else 2,
        eight_bit=spec.eight_bit,
        quantized=config.base.quantization != "none",
        double_quant=config.base.double_quant,
    )
