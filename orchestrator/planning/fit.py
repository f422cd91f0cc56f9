"""Says whether trials fit into the memory of a sweep's GPUs, before they begin. Loads no weights."""

from dataclasses import dataclass
from typing import Any

from orchestrator.base import share_modules
from orchestrator.base_size import BaseSize
from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.planning.gpus import GIB
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections import BaseSection
from orchestrator.training.engines.check_targets import EmptyBases
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.families.text_model import text_config
from orchestrator.training.fast.plan.eligibility import unsupported_reason
from orchestrator.training.fast.plan.engine_spec import EngineSpec
from orchestrator.training.fast.plan.memory import bytes_in_pieces
from orchestrator.training.fast.plan.memory_plan import Target, feasible_plans, smallest_plan
from orchestrator.training.fast.step.flat_batch import TokenizedRows


@dataclass(frozen=True)
class GpuMemory:
    """What trials may use of a worker's GPU."""

    budget: int
    """Bytes, with those of the base."""
    has_grouped_products: bool
    """Whether grouped products read their sizes on the device, as in `gpus.Gpu.has_grouped_products`."""

    @classmethod
    def here(cls) -> "GpuMemory | None":
        """Measure the GPU of this process; None without one."""
        import torch

        from orchestrator.training.fast.plan.eligibility import has_grouped_products
        from orchestrator.training.fast.plan.memory_plan import memory_budget

        return cls(memory_budget(), has_grouped_products()) if torch.cuda.is_available() else None


def foreseen_target(base: BaseSection, model: Any, budget: int, num_shards: int = 1) -> Target:
    """Describe a base that is not loaded, and the memory of a GPU.

    Args:
        base: the section of the base.
        model: the base on the meta device.
        budget: bytes of memory that trials may use.
        num_shards: GPUs that hold the base in pieces.
    """
    size = BaseSize.foreseen(base, share_modules(model)).num_bytes
    shape = BaseShape.of(text_config(model.config))
    if num_shards > 1:
        size = bytes_in_pieces(shape, size, num_shards, base.quantization != "none", base.double_quant)
    return Target(shape, size, budget, is_sharded=num_shards > 1)


class FitCheck:
    """Foresees the memory of single trials, by the rule by which workers choose how to hold them."""

    def __init__(self, spec: SweepSpec, data: PreparedData, memory: GpuMemory) -> None:
        """
        Args:
            spec: the experiment.
            data: tokenized rows.
            memory: of each worker's GPU.
        """
        self._num_shards = spec.num_shards
        self._rows = TokenizedRows.of(data.train), TokenizedRows.of(data.held_out)
        self._memory = memory
        self._empty = EmptyBases()
        self._targets: dict[BaseSection, Target] = {}

    def __call__(self, config: TrialConfig) -> str | None:
        """Return why a trial cannot fit; None where it fits, or where its memory is not foreseen.

        Not foreseen are trials that trl trains, and bases with their own code.

        Raises:
            RequestError: transformers cannot build the base.
        """
        model = None if config.training.engine == "trl" else self._empty.of(config.base)
        if model is None or self._is_for_trl(config, model):
            return None
        spec = EngineSpec.of(model, [config], 1, config.training.reproducible, on_gpu=True)
        target = self._target(config.base, model)
        if feasible_plans(target, spec, config, *self._rows):
            return None
        least = smallest_plan(target, spec, config, *self._rows).predicted
        assert least is not None
        needed, usable = least.total / GIB, self._memory.budget / GIB
        return f"needs {needed:.3g} GiB of GPU memory or more, and trials may use {usable:.3g} GiB"

    def _is_for_trl(self, config: TrialConfig, model: Any) -> bool:
        longest = max(each.longest for each in self._rows)
        try:
            return unsupported_reason(config, model, longest, self._memory.has_grouped_products) is not None
        except TrialError:  # the base has no such layers, which the trial itself reports
            return True

    def _target(self, base: BaseSection, model: Any) -> Target:
        if base not in self._targets:
            self._targets[base] = foreseen_target(base, model, self._memory.budget, self._num_shards)
        return self._targets[base]
