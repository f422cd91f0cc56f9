"""The interface of a training loop. SFTTrainer's own loop and the fast engine's implement it with the same results."""

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.adapters.bundle import Adapter
from orchestrator.record import RowScores
from orchestrator.training.fast.drive.answers import Answering
from orchestrator.training.fast.drive.multi_lora import TrialSteps


class Loop(Protocol):
    """Trains one adapter, and calls the trainer's callbacks as it does."""

    trainer: Any
    """The SFTTrainer, with its callbacks. Its PEFT model is up to date at evaluations, saves and the end."""

    def train(self, checkpoint: str | None, evaluates_first: bool = False) -> TrialSteps:
        """Train from the start or a checkpoint to the last step, or until a callback stops the training.

        Args:
            checkpoint: folder to continue from; None begins anew.
            evaluates_first: whether the evaluation at the checkpoint's step is made before the next step.
        """

    def adapter(self) -> Adapter:
        """Return the trained adapter, as a copy that later steps do not change. Call it at evaluations and the end."""

    def scores(self) -> RowScores | None:
        """Return the scores of the evaluation that has just run, with those of answers if it asks for them.

        None if the trial was asked to end while it answered.
        """

    def answer(self, weights: Mapping[str, Any]) -> Answering:
        """Load an adapter in place of the trained one, and have it answer. No step may follow.

        Args:
            weights: tensors by their names in PEFT's file.
        """

    def read_back(self) -> dict[str, Any]:
        """Return the live values, by the names of `model.targets.expected`."""
