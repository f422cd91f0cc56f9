"""Choose the engine of a trial, and open its training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.base import share_modules
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.training.engines.loop import Loop
from orchestrator.training.engines.memory_limits import MemoryLimits
from orchestrator.training.engines.sft import TrlLoop, build_trainer, require_independent_sequences
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.drive.joint import engine_for
from orchestrator.training.fast.drive.slot import Slot
from orchestrator.training.fast.plan.eligibility import unsupported_reason
from orchestrator.training.fast.plan.factory import release
from orchestrator.training.fast.plan.memory_plan import MemoryPlan
from orchestrator.training.fast.shard.base import sharded
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.model.adapter_init import eva_components
from orchestrator.training.model.peft_model import model_from_peft, model_from_template
from orchestrator.training.model.targets import expected_extra_trainables, expected_modules
from orchestrator.training.questions import Questions
from orchestrator.training.write_queue import WriteQueue


@dataclass(frozen=True)
class EngineSlot:
    """A slot of a fast engine: the place for one trial."""

    index: int
    engine: Engine
    plan: MemoryPlan


def find_slot(config: TrialConfig, inputs: TrialInputs, limits: MemoryLimits | None = None) -> EngineSlot | str | None:
    """Return a slot of an engine that holds only this trial, or the reason why SFTTrainer must train it.

    Args:
        config: the trial.
        inputs: what it trains on.
        limits: what has run out of memory in this process; None for nothing.

    Returns:
        The slot; or a reason; or None if the configuration asks for trl.

    Raises:
        TrialError: the fast engine cannot hold this trial, but `training.engine` or `training.reproducible` needs it.
    """
    wanted = "fast" if sharded(inputs.base) is not None else config.training.engine
    reason = None if wanted == "trl" else unsupported_reason(config, inputs.base, inputs.longest)
    if wanted != "trl" and reason is None:
        try:
            engine, plan = engine_for(
                inputs.base,
                [config],
                inputs.train,
                inputs.held_out,
                too_large=limits.too_large(config) if limits else None,
            )
        except TrialError as error:  # not enough memory, or not the same as transformers
            if wanted == "fast":
                raise
            reason = error.message
        else:
            return EngineSlot(0, engine, plan)
    elif wanted == "fast":
        if config.training.engine != "fast":  # on a base in pieces
            raise TrialError(
                f"resources.strategy shard needs the fast engine, which does not support {reason}",
                "Set resources.strategy to pipeline, or change what keeps the trial from the fast engine.",
            )
        raise TrialError(f"training.engine fast does not support {reason}", "Use auto or trl.")
    if config.training.reproducible and torch.cuda.is_available():
        raise TrialError(
            "training.reproducible: on a GPU this needs the fast engine, "
            + ("but training.engine is trl" if reason is None else f"which does not support {reason}"),
            "Set training.reproducible: false, or change what keeps the trial from the fast engine.",
        )
    release(inputs.base)  # frees the memory of an earlier trial's engine
    return reason


def open_loop(
    config: TrialConfig,
    inputs: TrialInputs,
    slot: EngineSlot | str | None,
    checkpoints: Path,
    write_queue: WriteQueue,
    questions: Questions | None = None,
    initial: Path | None = None,
    micro_batch: int | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Loop:
    """Open the trial's loop, with a model that shares the base's weights.

    Args:
        config: the trial.
        inputs: what it trains on.
        slot: from `find_slot`; anything but a slot means SFTTrainer's own loop.
        checkpoints: the folder of checkpoints.
        write_queue: writes them.
        questions: the prompts that it answers; None for none.
        initial: the adapter with which the trial begins; None for a new one.
        micro_batch: rows that SFTTrainer puts into a forward pass; None for `training.batch_size`.
        on_progress: called for each token of SFTTrainer's answers; the owner of a fast engine has its own.
    """
    base, tokenizer, data = inputs.base, inputs.tokenizer, inputs.data
    if isinstance(slot, EngineSlot):
        model = model_from_template(base, config)
        trainer = build_trainer(config, model, tokenizer, data, checkpoints, initial=initial)
        return Slot(slot.index, trainer, slot.engine, config, inputs.train, inputs.held_out, write_queue, questions)
    modules = expected_modules(base, config.lora)
    is_eva = config.lora.init == "eva"
    components = eva_components(share_modules(base), config, data, list(modules)) if is_eva else None
    model = model_from_peft(base, config, modules, expected_extra_trainables(base, config, modules, tokenizer))
    trainer = build_trainer(config, model, tokenizer, data, checkpoints, components, initial, micro_batch)
    if config.data.packing:
        require_independent_sequences(trainer)
    return TrlLoop(trainer, config, questions, on_progress)


def engine_fields(slot: EngineSlot | str | None) -> dict[str, Any]:
    """Return the fields of `TrialResult` that describe the engine.

    Args:
        slot: from `find_slot`.
    """
    if isinstance(slot, EngineSlot):
        return {"engine": "fast", "memory_plan": slot.plan.record()}
    return {"engine": "trl", "engine_reason": slot}
