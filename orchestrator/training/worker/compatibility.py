"""Which trials of a sweep can train beside each other, and how many."""

from contextlib import suppress
from dataclasses import dataclass

from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.engines.loop import EngineSlot, TrialInputs
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
    """How many trials should train together in this process, at most so many, and why. Loads the base."""
    if spec.training.engine == "trl" and "training.engine" not in {*spec.search.space, *spec.search.tied}:
        return 1, "engine trl trains one at a time"
    ground = TrialInputs.of(spec.base, data)
    configs = holdable(spec, ground)
    if not configs:
        return 1, "the fast engine cannot hold these trials"
    return memory_plan.plan_slots(ground.base, configs, ground.train, ground.held_out, wanted)


def holdable(spec: SweepSpec, ground: TrialInputs) -> list[TrialConfig]:
    """The corners of the search that the fast engine can hold on this base."""
    found = []
    for config in spec.corners_on_base():
        with suppress(TrialError):  # layers that are not there: it is told when the trial comes
            if unsupported_reason(config, ground.base, ground.longest) is None:
                found.append(config)
    return found


def not_packed_reason(config: TrialConfig, spec: SweepSpec) -> str | None:
    """Why no engine that a sweep's trials share can be this trial's, or None."""
    if config.training.engine == "trl":
        return "training.engine is trl"
    if config.base != spec.base:
        return "its base is another than that of the trials beside it"
    return None


@dataclass(frozen=True)
class JointSlots:
    """Slots of one engine, in whose passes all trials step together."""

    ground: TrialInputs
    plan: MemoryPlan
    _kind: EngineSpec
    _engine: Engine

    def refuses(self, config: TrialConfig) -> str | None:
        """Say why a trial on this base cannot be one of them; None where it can."""
        base = self.ground.base
        return unsupported_reason(config, base, self.ground.longest) or self._kind.refuses(base, config)

    def seat(self, slot: int, config: TrialConfig) -> EngineSlot:
        """The slot of this number for a trial."""
        return EngineSlot(slot, self._engine, self.plan)


@dataclass(frozen=True)
class SeparateSlots:
    """Slots with an engine each: every trial has the bits that it has alone."""

    ground: TrialInputs
    _engines: SeparateEngines

    @property
    def plan(self) -> MemoryPlan:
        """How all of them are held."""
        return self._engines.plan

    def refuses(self, config: TrialConfig) -> str | None:
        """Say why a trial on this base cannot be one of them; None where it can."""
        return unsupported_reason(config, self.ground.base, self.ground.longest) or self._engines.refuses(config)

    def seat(self, slot: int, config: TrialConfig) -> EngineSlot:
        """The slot of this number for a trial."""
        return EngineSlot(0, self._engines.engine(slot, config), self.plan)


Slots = JointSlots | SeparateSlots
"""Where the trials of a process train beside each other."""


def open_slots(
    spec: SweepSpec, ground: TrialInputs, num_slots: int, too_large: MemoryOption | None = None
) -> Slots | str:
    """Make the slots for the trials of a sweep, or say why they cannot train beside each other.

    Args:
        spec: the experiment.
        ground: what its trials train on.
        num_slots: trials at a time.
        too_large: has run out of memory: the new slots take less.
    """
    configs = holdable(spec, ground)
    if not configs:
        return "no trial of this sweep can train beside others"
    base, train, held_out = ground.base, ground.train, ground.held_out
    slots: Slots
    try:
        if steps_separately(configs[0]):
            slots = SeparateSlots(ground, SeparateEngines(base, configs, train, held_out, num_slots, too_large))
        else:
            engine, plan = engine_for(base, configs, train, held_out, num_slots, too_large)
            slots = JointSlots(ground, plan, EngineSpec.of(base, configs, num_slots), engine)
    except TrialError as error:
        return error.message
    for config in configs:
        peft_template(base, config)
    return slots
