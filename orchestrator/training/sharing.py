"""Which trials of a sweep can train beside each other, and how many."""

from contextlib import suppress
from dataclasses import dataclass

from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.fast import build
from orchestrator.training.fast.build import Kind, MemoryPlan, why_not
from orchestrator.training.fast.engine import Engine
from orchestrator.training.loop import Ground


def plan_slots(spec: SweepSpec, data: PreparedData, wanted: int) -> tuple[int, str]:
    """How many trials should train together in this process, at most so many, and why. Loads the base."""
    if spec.training.engine == "trl" and "training.engine" not in {*spec.search.space, *spec.search.tied}:
        return 1, "engine trl trains one at a time"
    ground = Ground.of(spec.base, data)
    configs = holdable(spec, ground)
    if not configs:
        return 1, "the fast engine cannot hold these trials"
    return build.plan_slots(ground.base, configs, ground.train, ground.held_out, wanted)


def holdable(spec: SweepSpec, ground: Ground) -> list[TrialConfig]:
    """The corners of the search that the fast engine can hold on this base."""
    found = []
    for config in spec.corners_on_base():
        with suppress(TrialError):  # layers that are not there: it is told when the trial comes
            if why_not(config, ground.base, ground.longest) is None:
                found.append(config)
    return found


def why_apart(config: TrialConfig, spec: SweepSpec) -> str | None:
    """Why no engine that a sweep's trials share can be this trial's, or None."""
    if config.training.engine == "trl":
        return "training.engine is trl"
    if config.base != spec.base:
        return "its base is another than that of the trials beside it"
    return None


@dataclass(frozen=True)
class Shared:
    """What the trials that train together share."""

    ground: Ground
    kind: Kind
    engine: Engine
    plan: MemoryPlan

    def refuses(self, config: TrialConfig) -> str | None:
        """Why a trial on this base cannot be one of them, or None."""
        base = self.ground.base
        return why_not(config, base, self.ground.longest) or self.kind.refuses(base, config)
