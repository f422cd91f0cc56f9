"""Decide which trials of a sweep can share an engine and how many, and open the slots that they share."""

from contextlib import suppress
from dataclasses import dataclass

from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.engines.choose import EngineSlot
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.joint import engine_for
from orchestrator.training.fast.drive.separate import SeparateEngines
from orchestrator.training.fast.plan import memory_plan
from orchestrator.training.fast.plan.eligibility import unsupported_reason
from orchestrator.training.fast.plan.engine_spec import EngineSpec
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.plan.memory_plan import MemoryPlan, steps_separately
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.model.peft_model import peft_template


def plan_slots(spec: SweepSpec, data: PreparedData, wanted: int) -> tuple[int, str]:
    """Decide how many trials should train at a time in this process. Loads the base.

    Args:
        spec: the experiment.
        data: tokenized rows.
        wanted: the largest number to consider.

    Returns:
        The number of slots, and the reason for it.
    """
    if spec.training.engine == "trl" and "training.engine" not in {*spec.search.space, *spec.search.tied}:
        return 1, "engine trl trains one at a time"
    inputs = TrialInputs.load(spec.base, data)
    configs = supported_corners(spec, inputs)
    if not configs:
        return 1, "the fast engine cannot hold these trials"
    target = memory_plan.Target.here(inputs.base)
    return memory_plan.plan_slots(target, inputs.base, configs, inputs.train, inputs.held_out, wanted)


def supported_corners(spec: SweepSpec, inputs: TrialInputs) -> list[TrialConfig]:
    """Return the corners of the search space that the fast engine supports on this base."""
    supported = []
    for config in spec.corners_on_base():
        with suppress(TrialError):  # unknown layers are reported when such a trial comes
            if unsupported_reason(config, inputs.base, inputs.longest) is None:
                supported.append(config)
    return supported


def not_packed_reason(config: TrialConfig, spec: SweepSpec) -> str | None:
    """Return why a trial can share no engine with the sweep's other trials, or None if it may.

    This looks at the configuration alone; `Slots.refusal_reason` checks a trial against the engine.
    """
    if config.training.engine == "trl":
        return "training.engine is trl"
    if config.base != spec.base:
        return "its base differs from that of the other trials"
    return None


@dataclass(frozen=True)
class JointSlots:
    """Slots of one engine, in which all trials step together."""

    inputs: TrialInputs
    plan: MemoryPlan
    _engine_spec: EngineSpec
    _engine: Engine

    def refusal_reason(self, config: TrialConfig) -> str | None:
        """Return why a trial on this base cannot have one of these slots, or None if it can."""
        base = self.inputs.base
        return unsupported_reason(config, base, self.inputs.longest) or self._engine_spec.refuses(base, config)

    def engine_slot(self, index: int, config: TrialConfig) -> EngineSlot:
        """Return the engine's slot of this number for a trial."""
        return EngineSlot(index, self._engine, self.plan)


@dataclass(frozen=True)
class SeparateSlots:
    """Slots with one engine each, so that a trial's results are the same bits whatever trains beside it."""

    inputs: TrialInputs
    _engines: SeparateEngines

    @property
    def plan(self) -> MemoryPlan:
        """How the engines of all slots are held in memory."""
        return self._engines.plan

    def refusal_reason(self, config: TrialConfig) -> str | None:
        """Return why a trial on this base cannot have one of these slots, or None if it can."""
        return unsupported_reason(config, self.inputs.base, self.inputs.longest) or self._engines.refuses(config)

    def engine_slot(self, index: int, config: TrialConfig) -> EngineSlot:
        """Return the only slot of the engine that belongs to slot `index` of the process."""
        return EngineSlot(0, self._engines.engine(index, config), self.plan)


Slots = JointSlots | SeparateSlots
"""The slots in which the trials of a process train at the same time."""


def open_slots(
    spec: SweepSpec, inputs: TrialInputs, num_slots: int, too_large: MemoryOption | None = None
) -> Slots | str:
    """Open the slots for a sweep's trials, or return why they cannot train at the same time.

    Args:
        spec: the experiment.
        inputs: what its trials train on.
        num_slots: trials at a time.
        too_large: the way of holding an engine that has run out of memory; the new slots take less.
    """
    configs = supported_corners(spec, inputs)
    if not configs:
        return "no trial of this sweep can share an engine"
    base, train, held_out = inputs.base, inputs.train, inputs.held_out
    slots: Slots
    try:
        if steps_separately(configs[0]):
            slots = SeparateSlots(inputs, SeparateEngines(base, configs, train, held_out, num_slots, too_large))
        else:
            engine, plan = engine_for(base, configs, train, held_out, num_slots, too_large)
            slots = JointSlots(inputs, plan, EngineSpec.of(base, configs, num_slots), engine)
    except TrialError as error:
        return error.message
    for config in configs:
        peft_template(base, config)
    return slots
