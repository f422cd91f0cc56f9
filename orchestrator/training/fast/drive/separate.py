"""One engine for each slot: trials step one after another, each with the same bits as when it trains alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.engine_spec import (
    EngineSpec,
    evaluation_tokens,
    longest_sequence,
    pass_tokens,
    separate_specs,
)
from orchestrator.training.fast.plan.factory import cached_engine, release
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.plan.memory_plan import (
    MemoryPlan,
    Target,
    feasible_plans,
    memory_budget,
    too_large_error,
)
from orchestrator.training.fast.plan.parity import refuse_mismatch, require_parity
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.fast.warmup import precompile


class SeparateEngines:
    """One-slot engines on one base.

    A trial's engine has the trial's own rank, layers and batches, as if the trial had the process to itself. A matrix
    product of many rows differs in its last bits from products of a few of them, and training amplifies the
    difference. So no sum of a trial may depend on the trials that train with it.
    """

    def __init__(
        self,
        base: Any,
        configs: Sequence[TrialConfig],
        train: TokenizedRows,
        held_out: TokenizedRows,
        num_slots: int,
        too_large: MemoryOption | None = None,
    ) -> None:
        """Plan the memory of all slots; on a GPU also compile and load the kernels and run the largest step.

        The arguments and the error are those of `joint.engine_for`. `configs` represent all trials that may come.
        """
        refuse_mismatch(base)
        self._base = base
        self._compute = getattr(torch, configs[0].base.compute_dtype)
        self._on_gpu = torch.cuda.is_available()
        self._slot_specs = separate_specs(base, configs)
        self._spec = spec = EngineSpec.of(base, configs, num_slots, separate=True)
        self._longest = longest_sequence(spec, train, held_out)
        plans = feasible_plans(Target.here(base), spec, configs[0], train, held_out, too_large)
        for plan in plans:
            try:
                peak = self._probe(plan, pass_tokens(spec, train, plan.option), evaluation_tokens(spec, held_out))
                # The largest engine may adapt no experts where another one does.
                most_experts = max(self._slot_specs, key=lambda spec: spec.expert_rank)
                for each in dict.fromkeys((self._slot_specs[0], most_experts)):
                    require_parity(base, self._engine(each, 0, plan), train, held_out)
            except torch.OutOfMemoryError:
                release(base)
                continue
            self.plan = replace(plan, measured=peak)
            return
        raise too_large_error(spec, self._longest, too_large)

    def refuses(self, config: TrialConfig) -> str | None:
        """Return why a trial, which the fast engine can hold, cannot train in these engines; None where it can."""
        if reason := self._spec.refuses(self._base, config):
            return reason
        own = EngineSpec.of(self._base, [config], 1)
        if self._on_gpu and not any(_same_kernels(own, spec) for spec in self._slot_specs):
            return "its adapted layers differ from those that the slots were built for"
        return None

    def engine(self, slot: int, config: TrialConfig) -> Engine:
        """Return a slot's engine for this trial. The slot's earlier trial must have ended."""
        return self._engine(EngineSpec.of(self._base, [config], 1), slot, self.plan)

    def _engine(self, spec: EngineSpec, slot: int, plan: MemoryPlan) -> Engine:
        return cached_engine(self._base, spec, self._compute, self._longest, plan.option, self._on_gpu, slot)

    def _probe(self, plan: MemoryPlan, tokens: int, evaluated: int) -> int | None:
        """Run the largest step in each kind of engine: during a graph capture, no kernel can be compiled or loaded.

        Args:
            plan: how the engines are held.
            tokens: tokens of the largest training pass.
            evaluated: tokens of the largest evaluation pass.

        Returns:
            Peak GPU memory in bytes with the adapters of all slots; None on a CPU.
        """
        if not self._on_gpu:
            return None
        precompile.join()
        peaks = []
        for spec in self._slot_specs:
            engine = self._engine(spec, 0, plan)
            engine.probe(tokens, evaluated)
            peaks.append((engine.peak_bytes or 0) + (self._spec.num_slots - 1) * engine.adapters.num_bytes)
        if max(peaks) > memory_budget():
            raise torch.OutOfMemoryError("the adapters of all slots do not fit beside the largest step")
        return max(peaks)


def _same_kernels(spec: EngineSpec, other: EngineSpec) -> bool:
    return (spec.rank, spec.modules, spec.eight_bit) == (other.rank, other.modules, other.eight_bit)
