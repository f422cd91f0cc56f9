"""What all trials of one engine share, and how many tokens its passes hold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.sizes import EVALUATION_TOKENS
from orchestrator.training.fast.step.adapters import grouped_rank, padded_rank
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.model.patterns import largest_rank
from orchestrator.training.model.precision import resolve_precision
from orchestrator.training.model.targets import adapted_names, expected_experts


@dataclass(frozen=True)
class EngineSpec:
    """Describes an engine by what all of its trials share."""

    num_slots: int
    rank: int
    """Stack rank: the largest rank of the trials' layers; on a GPU, padded."""
    expert_rank: int
    """The same for the experts of the trials that adapt them; 0 where none does."""
    modules: frozenset[str]
    """Names of all linear layers and parameters of experts that any of the trials adapts."""
    precision: str
    adapter_dtype: str
    eight_bit: bool
    """Whether the optimizer's moments are in eight bits."""
    keeps_base: bool | None
    """Whether the dequantized base is kept; None where the available memory decides."""
    recompute: bool | None
    """Whether whole layers are recomputed; None where the available memory decides."""
    max_rows: int
    """Rows of the largest batch."""
    reproducible: bool
    """Whether a trial's metrics must not depend on memory or on neighboring trials. Always so on a CPU, hence False."""
    answer_tokens: int = 0
    """Most tokens that are generated after a held-out prompt; 0 where nothing is generated."""
    separate: bool = False
    """Whether each slot has an engine of its own, which steps by itself."""

    @classmethod
    def of(
        cls,
        base: Any,
        configs: Sequence[TrialConfig],
        num_slots: int,
        separate: bool = False,
        on_gpu: bool | None = None,
    ) -> "EngineSpec":
        """Describe the engine for these trials. Where they differ in what must be the same, the first trial decides.

        Args:
            base: the base without adapters; its weights are not read.
            configs: the trials.
            num_slots: trials at a time.
            separate: whether each slot has an engine of its own.
            on_gpu: whether the engine is to run on a GPU; None asks this machine.
        """
        training, has_bf16 = configs[0].training, on_gpu
        on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
        names = [adapted_names(base, config.lora) for config in configs]
        rank = max(largest_rank(config.lora, each) for config, each in zip(configs, names, strict=True))
        expert_ranks = [
            largest_rank(config.lora, experts) for config in configs if (experts := expected_experts(base, config.lora))
        ]
        return cls(
            num_slots,
            padded_rank(rank) if on_gpu else rank,
            max((grouped_rank(each) for each in expert_ranks), default=0),
            frozenset().union(*names),
            resolve_precision(training, has_bf16),
            training.adapter_dtype,
            "8bit" in training.optimizer,
            None if training.dequantize == "auto" else training.dequantize == "once",
            None if training.recompute == "auto" else training.recompute,
            max(config.training.batch_size * config.training.accumulation for config in configs),
            training.reproducible and on_gpu,
            max(config.evaluation.answer_tokens for config in configs),
            separate,
        )

    def refuses(self, base: Any, config: TrialConfig) -> str | None:
        """Return why a trial, which the fast engine can hold, cannot train in this engine; None where it can."""
        own = EngineSpec.of(base, [config], self.num_slots)
        for name, field in _SHARED_FIELDS.items():
            if getattr(own, name) != getattr(self, name):
                return f"{field} differs from that of the trials that share the engine"
        if own.rank > self.rank or own.expert_rank > self.expert_rank or not own.modules <= self.modules:
            return "its rank or its adapted layers exceed what the slots were built for"
        return None


_SHARED_FIELDS = {
    "precision": "training.precision",
    "adapter_dtype": "training.adapter_dtype",
    "eight_bit": "the precision of training.optimizer's moments",
    "keeps_base": "training.dequantize",
    "recompute": "training.recompute",
    "reproducible": "training.reproducible",
}
"""Fields of `EngineSpec` in which the trials of an engine must agree -> their names for the user."""


def longest_sequence(spec: EngineSpec, train: TokenizedRows, held_out: TokenizedRows) -> int:
    """Return the tokens of the longest sequence: a row, or a held-out prompt with its answer."""
    return max(train.longest, held_out.longest + spec.answer_tokens)


def separate_specs(base: Any, configs: Sequence[TrialConfig]) -> list[EngineSpec]:
    """List the one-slot engines that trials may need, the largest first.

    Args:
        base: the base without adapters.
        configs: trials that represent all others: their ranks are the ends of the range, or all ranks.
    """
    specs = [EngineSpec.of(base, [config], 1) for config in configs]
    ranks = {spec.rank for spec in specs}
    if torch.cuda.is_available():
        ranks = {1 << power for power in range(min(ranks).bit_length() - 1, max(ranks).bit_length())}
    # Kernels are compiled for modules, moments and rank: keep one spec for each combination.
    expert_rank = max(spec.expert_rank for spec in specs)
    distinct = {
        (spec.modules, spec.eight_bit, rank): replace(
            spec, rank=rank, expert_rank=expert_rank if spec.expert_rank else 0
        )
        for spec in specs
        for rank in ranks
    }
    return sorted(distinct.values(), key=lambda spec: (spec.rank, len(spec.modules)), reverse=True)


def pass_tokens(spec: EngineSpec, train: TokenizedRows, option: MemoryOption | None = None) -> int:
    """Return how many tokens a training pass should hold.

    It holds the largest batch of one slot, or 1.1 times the average batches of all slots, whichever is more. A batch
    that does not fit into a pass waits for the next one.

    Args:
        spec: the engine.
        train: rows to train on.
        option: limits the number of tokens.
    """
    largest = int(np.sort(train.lengths)[-spec.max_rows :].sum())
    if spec.num_slots > 1 and not spec.separate:
        typical = 1.1 * spec.num_slots * spec.max_rows * float(train.lengths.mean())
        largest = max(largest, int(typical))
    return largest if option is None else min(largest, option.max_tokens)


def evaluation_tokens(spec: EngineSpec, held_out: TokenizedRows) -> int:
    """Return the tokens of the largest evaluation pass."""
    slots_in_pass = 1 if spec.separate else spec.num_slots
    return min(int(held_out.lengths.sum()) * slots_in_pass, max(EVALUATION_TOKENS, held_out.longest))
