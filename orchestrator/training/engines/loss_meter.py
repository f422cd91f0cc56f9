"""Loss and hits of each held-out row, as SFTTrainer's own evaluation passes compute them."""

from collections.abc import Sequence
from typing import Any

from orchestrator.record import RowScores


class LossMeter:
    """A forward hook that keeps what the model's own evaluation passes return.

    The Trainer's evaluation loss is the mean over batches of each batch's mean, and so depends on how rows fall into
    batches. Sums by row do not. They cost nothing, for trl's fused head already returns each token's log-probability
    (trl 1.16, `trainer/utils.py`, `FusedCausalLMOutput`: log_probs, is_top1 and label_mask, each (batch, tokens - 1),
    zero where no label is).
    """

    def __init__(self, model: Any, order: Sequence[int]) -> None:
        """
        Args:
            model: hooked.
            order: of the rows as an evaluation passes over them.
        """
        self._order = order
        self._sums: list[Any] = []
        self._handle = model.register_forward_hook(self._collect)

    def _collect(self, model: Any, inputs: Any, output: Any) -> None:
        import torch

        if model.training or getattr(output, "log_probs", None) is None:
            return
        columns = (-output.log_probs.double(), output.is_top1, output.label_mask)
        # Kept on the device: reading them here would wait for it at each batch.
        self._sums.append(torch.stack([column.sum(dim=1).double() for column in columns]))

    def read(self) -> RowScores:
        """Of the evaluation that has just run."""
        import torch

        columns = torch.cat([sums.cpu() for sums in self._sums], dim=1)[:, -len(self._order) :]
        self._sums.clear()
        by_row = torch.empty_like(columns)
        by_row[:, torch.tensor(self._order)] = columns
        losses, hits, tokens = by_row.tolist()
        return RowScores(losses=losses, hits=[int(each) for each in hits], tokens=[int(each) for each in tokens])

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()
