"""Loss and hits of each held-out row, collected from SFTTrainer's own evaluation passes."""

from collections.abc import Sequence
from typing import Any

from orchestrator.record import RowScores


class LossMeter:
    """A forward hook that collects per-row sums from the model's evaluation passes.

    The Trainer's evaluation loss is the mean over batches of each batch's mean. It depends on how rows are grouped into
    batches; sums by row do not. The sums cost nothing, because trl's fused head already returns each token's
    log-probability (trl 1.16, `trainer/utils.py`, `FusedCausalLMOutput`: log_probs, is_top1 and label_mask, each
    (batch, tokens - 1), zero where there is no label).
    """

    def __init__(self, model: Any, order: Sequence[int]) -> None:
        """
        Args:
            model: the model to hook.
            order: row numbers in the order in which an evaluation visits them.
        """
        self._order = order
        self._sums: list[Any] = []
        self._handle = model.register_forward_hook(self._collect)

    def _collect(self, model: Any, inputs: Any, output: Any) -> None:
        import torch

        if model.training or getattr(output, "log_probs", None) is None:
            return
        columns = (-output.log_probs.double(), output.is_top1, output.label_mask)
        # Kept on the device: reading them here would synchronize with it at each batch.
        self._sums.append(torch.stack([column.sum(dim=1).double() for column in columns]))

    def read(self) -> RowScores:
        """Return the scores of the evaluation that has just run, and forget them."""
        import torch

        columns = torch.cat([sums.cpu() for sums in self._sums], dim=1)[:, -len(self._order) :]
        self._sums.clear()
        by_row = torch.empty_like(columns)
        by_row[:, torch.tensor(self._order)] = columns
        losses, hits, tokens = by_row.tolist()
        return RowScores(losses=losses, hits=[int(each) for each in hits], tokens=[int(each) for each in tokens])

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()
