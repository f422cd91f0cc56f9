"""Record what has run out of GPU memory in this process: trials of the same kind then take less."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.memory import MemoryOption

if TYPE_CHECKING:
    from orchestrator.training.engines.choose import EngineSlot

_WITHOUT_EFFECT = {
    "lora": {"alpha"},
    "training": {
        "steps",
        "epochs",
        "learning_rate",
        "schedule",
        "warmup",
        "cycles",
        "final_rate",
        "decay_steps",
        "beta1",
        "beta2",
        "epsilon",
        "momentum",
        "weight_decay",
        "label_smoothing",
        "eval_steps",
        "logging_steps",
        "save_steps",
        "seed",
    },
}
"""Fields that have no effect on the memory of a trial. Trials that differ only in these are of one kind."""


@dataclass
class MemoryLimits:
    """The largest forms of trials that may still fit, by kind of trial."""

    _too_large: dict[str, MemoryOption] = field(default_factory=dict)
    _micro_batches: dict[str, int] = field(default_factory=dict)

    def too_large(self, config: TrialConfig) -> MemoryOption | None:
        """Return the option of the fast engine that ran out of memory for such a trial; None if none did."""
        return self._too_large.get(_kind(config))

    def micro_batch(self, config: TrialConfig) -> int:
        """Return how many rows SFTTrainer puts into a forward pass of such a trial."""
        return self._micro_batches.get(_kind(config), config.training.batch_size)

    def lower(self, config: TrialConfig, slot: "EngineSlot | str | None") -> bool:
        """Note that a trial has run out of memory in its present form.

        Args:
            config: the trial.
            slot: its slot in the fast engine; anything else means SFTTrainer.

        Returns:
            Whether there is a smaller form. In the fast engine another attempt finds out.
        """
        if slot is not None and not isinstance(slot, str):
            self._too_large[_kind(config)] = slot.plan.option
            return True
        rows = self.micro_batch(config)
        smaller = [size for size in range(1, rows) if config.training.batch_size % size == 0 and size <= rows / 2]
        if not smaller:
            return False
        self._micro_batches[_kind(config)] = smaller[-1]
        return True

    def warning(self, config: TrialConfig, slot: "EngineSlot | str | None") -> str | None:
        """Return a sentence for the record of a trial that has less than it asked for; None for other trials."""
        if slot is not None and not isinstance(slot, str):
            large = self.too_large(config)
            if large is None:
                return None
            held = slot.plan.option
            return (
                f"out of GPU memory with recompute={large.recompute} and passes of {large.max_tokens} tokens: "
                f"continues with recompute={held.recompute} and passes of {held.max_tokens} tokens"
            )
        batch, rows = config.training.batch_size, self.micro_batch(config)
        if rows == batch:
            return None
        return (
            f"out of GPU memory with training.batch_size={batch}: continues with {rows} rows in a forward pass and "
            f"{batch // rows} times as many passes in a step, so that a step has the same rows"
        )


def _kind(config: TrialConfig) -> str:
    return config.model_dump_json(exclude=_WITHOUT_EFFECT)
