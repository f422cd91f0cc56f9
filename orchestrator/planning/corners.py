"""The memory of the corners of a search space on a GPU, and how many trials train together. Loads no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.errors import TrialError
from orchestrator.planning.fit import foreseen_target
from orchestrator.planning.gpus import GIB, Gpu
from orchestrator.planning.makespan import PackTimes, TrialSize
from orchestrator.planning.models import CornerPlan
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections import BaseSection
from orchestrator.training.engines.check_targets import EmptyBases
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.plan.eligibility import unsupported_reason
from orchestrator.training.fast.plan.engine_spec import EngineSpec
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.plan.memory_plan import (
    MARGIN,
    MemoryPlan,
    Target,
    feasible_plans,
    plan_slots,
    smallest_plan,
    too_large_error,
)
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.worker.compatibility import not_packed_reason

_CONTEXT = int(0.6 * GIB)
"""Bytes of a process's CUDA context, which torch does not count."""

_GIVEN_UP = {"nothing": "", "elementwise": "norms and activations recomputed", "layers": "layers recomputed"}

Rows = tuple[TokenizedRows, TokenizedRows]
"""Rows to train on, and held-out rows."""


@dataclass(frozen=True)
class Pack:
    """The trials that train together on one GPU: one engine, foreseen."""

    spec: EngineSpec
    option: MemoryOption
    shape: BaseShape

    @property
    def times(self) -> PackTimes:
        """Times of its passes, for `makespan`."""
        adapted = frozenset(name.rpartition(".")[2] for name in self.spec.modules)
        return PackTimes(self.shape, self.option, self.spec.rank, adapted, self.spec.separate)


class Outlook:
    """A base without weights and a GPU: what trials of its rows would take there."""

    def __init__(
        self, base: BaseSection, model: Any, gpu: Gpu, rows: Rows, budget: int | None = None, num_shards: int = 1
    ) -> None:
        """
        Args:
            base: the section of the base.
            model: the base on the meta device.
            gpu: where trials are to run.
            rows: what they train on.
            budget: bytes of memory that trials may use; None derives it from the GPU's memory.
            num_shards: GPUs that hold the base in pieces.
        """
        self._base = base
        self._num_shards = num_shards
        self.model = model
        self.gpu = gpu
        self.rows = rows
        self._budget = int((1 - MARGIN) * gpu.memory) - _CONTEXT if budget is None else budget

    @cached_property
    def _target(self) -> Target:
        return foreseen_target(self._base, self.model, self._budget, self._num_shards)

    def reason(self, config: TrialConfig) -> str | None:
        """Return why the fast engine cannot hold a trial on this GPU, or None where it can."""
        longest = max(each.longest for each in self.rows)
        return unsupported_reason(config, self.model, longest, self.gpu.has_grouped_products)

    def slots(self, configs: Sequence[TrialConfig], wanted: int) -> tuple[int, str]:
        """Return how many of these trials train together, and why (`memory_plan.plan_slots`)."""
        return plan_slots(self._target, self.model, configs, *self.rows, wanted)

    def pack(self, configs: Sequence[TrialConfig], slots: int) -> Pack | None:
        """Return the engine in which so many of these trials train together; None where they do not fit."""
        spec = self._spec(configs, slots)
        plans = feasible_plans(self._target, spec, configs[0], *self.rows)
        return Pack(spec, plans[0].option, self._target.shape) if plans else None

    def corner(self, config: TrialConfig) -> CornerPlan:
        """Foresee one trial alone."""
        if config.training.engine == "trl":
            return _unknown(config, None)
        try:
            reason = self.reason(config)
        except TrialError as error:
            reason = error.message
        if reason is not None:
            return _unknown(config, reason)
        spec = self._spec([config], 1)
        plans = feasible_plans(self._target, spec, config, *self.rows)
        plan = plans[0] if plans else smallest_plan(self._target, spec, config, *self.rows)
        return self._described(config, spec, plan, bool(plans))

    def _spec(self, configs: Sequence[TrialConfig], slots: int) -> EngineSpec:
        return EngineSpec.of(self.model, configs, slots, configs[0].training.reproducible, on_gpu=True)

    def _described(self, config: TrialConfig, spec: EngineSpec, plan: MemoryPlan, fits: bool) -> CornerPlan:
        assert plan.predicted is not None
        size = TrialSize.of(config, *self.rows)
        times = Pack(spec, plan.option, self._target.shape).times
        return CornerPlan(
            values=config.varied,
            rank=config.lora.rank,
            batch_rows=spec.max_rows,
            engine="fast",
            reason=None if fits else too_large_error(spec, max(each.longest for each in self.rows)).remedy,
            fits=fits,
            memory_gib={name: round(number / GIB, 3) for name, number in plan.predicted.parts().items()},
            form=_form(plan.option),
            step_s=round(times.step_seconds(self.gpu, [size]), 6),
        )


def _unknown(config: TrialConfig, reason: str | None) -> CornerPlan:
    """Return a corner that trl trains. Its memory has no formula here: padding, checkpoints of torch and its caches."""
    rows = config.training.batch_size * config.training.accumulation
    return CornerPlan(
        values=config.varied,
        rank=config.lora.rank,
        batch_rows=rows,
        engine="trl",
        reason=reason,
        fits=None,
        memory_gib={},
        form=None,
        step_s=None,
    )


def _form(option: MemoryOption) -> str:
    """Say how an engine is held."""
    parts = ["base kept dequantized" if option.keeps_base else "base dequantized at use", _GIVEN_UP[option.recompute]]
    return ", ".join([*filter(None, parts), f"passes of up to {option.max_tokens} tokens"])


def plan_corners(spec: SweepSpec, outlooks: dict[BaseSection, Outlook]) -> list[CornerPlan]:
    """Foresee each kind of trial once. Corners that need the same are one.

    Those that cannot fit come first, then those with the largest batches, and of these the largest ranks.

    Args:
        spec: the experiment.
        outlooks: base -> its outlook; trials on other bases are left out.
    """
    found: dict[tuple[Any, ...], CornerPlan] = {}
    for config in spec.samples():
        if (outlook := outlooks.get(config.base)) is None:
            continue
        corner = outlook.corner(config)
        key = (config.base, corner.engine, corner.reason, corner.rank, corner.batch_rows, *corner.memory_gib.values())
        found.setdefault(key, corner)
    return sorted(found.values(), key=lambda each: (each.fits is not False, -each.batch_rows, -each.rank))


def together_reason(config: TrialConfig, spec: SweepSpec, outlook: Outlook) -> str | None:
    """Return why a trial does not train together with the sweep's others, or None where it does."""
    if reason := not_packed_reason(config, spec):
        return reason
    try:
        return outlook.reason(config)
    except TrialError as error:
        return error.message


def empty_outlook(
    base: BaseSection, empty: EmptyBases, gpu: Gpu, rows: Rows, budget: int | None, num_shards: int = 1
) -> Outlook | None:
    """Return the outlook of a base; None for one with its own code, or not on this machine."""
    model = empty.of(base)
    return None if model is None else Outlook(base, model, gpu, rows, budget, num_shards)
