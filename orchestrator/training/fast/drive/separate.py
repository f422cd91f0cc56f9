"""An engine for each slot: trials beside each other step one after another, each with the bits that it has alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.factory import (
    EngineSpec,
    MemoryPlan,
    cached_engine,
    does_not_fit,
    evaluation_tokens,
    feasible,
    memory_budget,
    pass_tokens,
    release,
    separate_specs,
)
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.fast.warmup import precompile


class SeparateEngines:
    """Engines of one slot each, on one base.

    A trial's engine has its own rank, layers and batches, as if it had the process to itself. A product of many rows
    differs in its last bits from products of a few of them, and training amplifies that: so no sum of a trial may
    depend on the trials beside it.
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
        """Plan the memory of all slots; on a GPU also compile, load and try what their steps need.

        Args:
            base: the bare base.
            configs: trials that stand for all that may come.
            train: rows to train on.
            held_out: rows to evaluate on.
            num_slots: trials at a time.
            too_large: has run out of memory in spite of the trial step: the plan takes less.

        Raises:
            TooLargeError: they do not fit, whatever is given up.
        """
        self._base = base
        self._compute = getattr(torch, configs[0].base.compute_dtype)
        self._longest = max(train.longest, held_out.longest)
        self._on_gpu = torch.cuda.is_available()
        self._kinds = separate_specs(base, configs)
        self._kind = kind = EngineSpec.of(base, configs, num_slots, separate=True)
        plans = feasible(base, kind, configs[0], train, held_out, too_large)
        for plan in plans:
            try:
                peak = self._probe(plan, pass_tokens(kind, train, plan.choice), evaluation_tokens(kind, held_out))
            except torch.OutOfMemoryError:
                release(base)
                continue
            self.plan = replace(plan, measured=peak)
            return
        raise does_not_fit(kind, self._longest)

    def refuses(self, config: TrialConfig) -> str | None:
        """Say why a trial, which the fast engine can hold, cannot have one of these engines; None where it can."""
        if reason := self._kind.refuses(self._base, config):
            return reason
        own = EngineSpec.of(self._base, [config], 1)
        if self._on_gpu and not any(_same_kernels(own, kind) for kind in self._kinds):
            return "its layers are others than those of the trials that the slots were made for"
        return None

    def engine(self, slot: int, config: TrialConfig) -> Engine:
        """The engine of a slot for this trial; the slot's earlier trial has ended."""
        return self._engine(EngineSpec.of(self._base, [config], 1), slot, self.plan)

    def _engine(self, kind: EngineSpec, slot: int, plan: MemoryPlan) -> Engine:
        return cached_engine(self._base, kind, self._compute, self._longest, plan.choice, self._on_gpu, slot)

    def _probe(self, plan: MemoryPlan, tokens: int, evaluated: int) -> int | None:
        """Run the largest step with each kind of engine. A captured graph can neither compile nor load a kernel.

        Returns:
            Bytes of GPU memory at the peak, with the adapters of all slots; None on a CPU.
        """
        if not self._on_gpu:
            return None
        precompile.join()
        peaks = []
        for kind in self._kinds:
            engine = self._engine(kind, 0, plan)
            engine.probe(tokens, evaluated)
            peaks.append((engine.peak_bytes or 0) + (self._kind.num_slots - 1) * engine.adapters.num_bytes)
        if max(peaks) > memory_budget():
            raise torch.OutOfMemoryError("the adapters of all slots do not fit beside such a step")
        return max(peaks)


def _same_kernels(kind: EngineSpec, other: EngineSpec) -> bool:
    return (kind.rank, kind.modules, kind.eight_bit) == (other.rank, other.modules, other.eight_bit)
