"""The loop that makes a trial's steps: SFTTrainer's own, or the fast engine's; their results are the same."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.training.trl import TrlLoop, build_trainer


class Loop(Protocol):
    """Trains one adapter, telling the trainer's callbacks."""

    trainer: Any
    """The SFTTrainer: its callbacks, and its PEFT model, which is up to date at evaluations, saves and the end."""

    def train(self, checkpoint: str | None) -> None:
        """From the start or a checkpoint to the last step, or until a callback stops it."""

    def measured(self) -> dict[str, float]:
        """`eval/loss` and `eval/token_accuracy` of the evaluation that has just run."""

    def read_back(self) -> dict[str, Any]:
        """Live values by the names of `applied.expected`."""


def open_loop(
    config: TrialConfig,
    base: Any,
    modules: Collection[str],
    tokenizer: Any,
    data: PreparedData,
    checkpoints: Path,
    sharing: int = 1,
) -> tuple[Loop, dict[str, Any]]:
    """The trial's loop, and what its record says of it: fields of `TrialResult`.

    Args:
        config: the trial.
        base: the bare base, from `base.lease`.
        modules: names of the layers to adapt.
        tokenizer: the base's, with a padding token.
        data: tokenised rows.
        checkpoints: folder of checkpoints.
        sharing: trials that share this process's GPU, this one included.

    Raises:
        TrialError: `training.engine` is fast, which cannot hold this trial.
    """
    from orchestrator.training.fast.build import engine_for, release, why_not
    from orchestrator.training.fast.row import Rows
    from orchestrator.training.fast.slot import Slot

    wanted, reason = config.training.engine, None
    if wanted != "trl":
        rows, held_out = Rows.of(data.train), Rows.of(data.held_out)
        longest = max(rows.longest, held_out.longest)
        reason = why_not(config, base, modules, longest)
        if reason is None:
            try:
                engine, plan = engine_for(base, config, modules, rows, held_out, sharing)
            except TrialError as error:  # it does not fit
                if wanted == "fast":
                    raise
                reason = error.message
            else:
                trainer = build_trainer(config, base, tokenizer, data, checkpoints)
                slot = Slot(0, trainer, engine, config, rows, held_out)
                return slot, {"engine": "fast", "memory_plan": plan.record()}
        elif wanted == "fast":
            raise TrialError(f"training.engine: fast cannot hold {reason}", "Use auto or trl.")
    release(base)  # memory that an earlier trial's engine keeps
    trainer = build_trainer(config, base, tokenizer, data, checkpoints)
    return TrlLoop(trainer), {"engine": "trl", "engine_reason": reason}
