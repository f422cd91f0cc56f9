"""The loop that makes a trial's steps: SFTTrainer's own, or the fast engine's; their results are the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator.adapters.bundle import Adapter
from orchestrator.adapters.stops import stops_of, unique_ids
from orchestrator.base import load_tokenizer, share_modules, shared_base
from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.record import RowScores
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection
from orchestrator.training.attempt.events import WriteQueue
from orchestrator.training.engines.sft import TrlLoop, build_trainer, require_apart
from orchestrator.training.fast.drive.multi_lora import TrialSteps
from orchestrator.training.fast.drive.slot import Slot
from orchestrator.training.fast.plan.eligibility import unsupported_reason
from orchestrator.training.fast.plan.factory import MemoryPlan, engine_for, release
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.model.adapter_init import eva_components
from orchestrator.training.model.peft_model import adapted, adapted_by_peft
from orchestrator.training.model.targets import expected_beside, expected_modules


class Loop(Protocol):
    """Trains one adapter, telling the trainer's callbacks."""

    trainer: Any
    """The SFTTrainer: its callbacks, and its PEFT model, which is up to date at evaluations, saves and the end."""

    def train(self, checkpoint: str | None) -> TrialSteps:
        """From the start or a checkpoint to the last step, or until a callback stops it."""

    def adapter(self) -> Adapter:
        """What has been trained; nothing changes it later. For evaluations and the end."""

    def scores(self) -> RowScores:
        """Of the evaluation that has just run."""

    def read_back(self) -> dict[str, Any]:
        """Live values by the names of `expected.expected`."""


@dataclass(frozen=True)
class TrialInputs:
    """What the trials of a process train on."""

    base: Any
    """Kept: read only."""
    tokenizer: Any
    """With a padding token."""
    data: PreparedData
    train: TokenizedRows
    held_out: TokenizedRows

    @classmethod
    def of(cls, base: BaseSection, data: PreparedData) -> "TrialInputs":
        """Load the base, if it is not there already."""
        tokenizer = load_tokenizer(base, data.chat_template)
        return cls(shared_base(base), tokenizer, data, TokenizedRows.of(data.train), TokenizedRows.of(data.held_out))

    @property
    def stop_tokens(self) -> list[int]:
        """Ids at which answers are over: those of the training rows, and those of the base itself."""
        return unique_ids(self.data.stop_tokens, stops_of(self.base))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.train.longest, self.held_out.longest)


@dataclass(frozen=True)
class EngineSlot:
    """A slot of an engine."""

    index: int
    engine: Engine
    plan: MemoryPlan


def find_slot(config: TrialConfig, ground: TrialInputs) -> EngineSlot | str | None:
    """The slot of an engine for this trial alone; or why it has none: None where it is to be trl's.

    Raises:
        TrialError: the fast engine cannot hold this trial, and `training.engine` or `training.reproducible` needs it.
    """
    wanted = config.training.engine
    reason = None if wanted == "trl" else unsupported_reason(config, ground.base, ground.longest)
    if wanted != "trl" and reason is None:
        try:
            engine, plan = engine_for(ground.base, [config], ground.train, ground.held_out)
        except TrialError as error:  # it does not fit
            if wanted == "fast":
                raise
            reason = error.message
        else:
            return EngineSlot(0, engine, plan)
    elif wanted == "fast":
        raise TrialError(f"training.engine: fast cannot hold {reason}", "Use auto or trl.")
    if config.training.reproducible and torch.cuda.is_available():
        raise TrialError(
            "training.reproducible: on a GPU this needs the fast engine, "
            + ("but training.engine is trl" if reason is None else f"which cannot hold {reason}"),
            "Set training.reproducible: false, or change what keeps the trial from the fast engine.",
        )
    release(ground.base)  # memory that an earlier trial's engine keeps
    return reason


def open_loop(
    config: TrialConfig, ground: TrialInputs, seat: EngineSlot | str | None, checkpoints: Path, aside: WriteQueue
) -> Loop:
    """The trial's loop, with a model of its own over the base.

    Args:
        config: the trial.
        ground: what it trains on.
        seat: from `find_slot`.
        checkpoints: folder of checkpoints.
        aside: writes them.
    """
    base, tokenizer, data = ground.base, ground.tokenizer, ground.data
    if isinstance(seat, EngineSlot):
        trainer = build_trainer(config, adapted(base, config), tokenizer, data, checkpoints)
        return Slot(seat.index, trainer, seat.engine, config, ground.train, ground.held_out, aside)
    modules = expected_modules(base, config.lora)
    read = eva_components(share_modules(base), config, data, list(modules)) if config.lora.init == "eva" else None
    model = adapted_by_peft(base, config, modules, expected_beside(base, config, modules, tokenizer))
    trainer = build_trainer(config, model, tokenizer, data, checkpoints, read)
    if config.data.packing:
        require_apart(trainer)
    return TrlLoop(trainer, config)


def about(seat: EngineSlot | str | None) -> dict[str, Any]:
    """What a trial's record says of its loop: fields of `TrialResult`."""
    if isinstance(seat, EngineSlot):
        return {"engine": "fast", "memory_plan": seat.plan.record()}
    return {"engine": "trl", "engine_reason": seat}
