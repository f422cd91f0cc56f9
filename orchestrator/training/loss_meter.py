"""Loss and accuracy over held-out rows, weighted by token."""

from typing import Any


class LossMeter:
    """A forward hook that sums what the model's own evaluation passes return.

    The Trainer's evaluation loss is the mean over batches of each batch's mean, and so depends on how rows fall into
    batches. This one is the sum of all tokens' losses over their number: the same for any batch size. It costs
    nothing, for trl's fused head already returns each token's log-probability (trl 1.16, `trainer/utils.py`,
    `FusedCausalLMOutput`: log_probs, is_top1 and label_mask, each (batch, tokens - 1), zero where no label is).
    """

    def __init__(self, model: Any) -> None:
        self._sums: list[tuple[Any, Any, Any]] = []
        self._handle = model.register_forward_hook(self._collect)

    def _collect(self, model: Any, inputs: Any, output: Any) -> None:
        if model.training or getattr(output, "log_probs", None) is None:
            return
        tokens = output.label_mask.sum()
        # Kept on the device: reading them here would wait for it at each batch.
        self._sums.append((-output.log_probs.float().sum(), output.is_top1.sum(), tokens))

    def read(self) -> dict[str, float]:
        """`eval/loss` and `eval/token_accuracy` since the last call."""
        loss, correct, tokens = (sum(float(value) for value in column) for column in zip(*self._sums, strict=True))
        self._sums.clear()
        return {"eval/loss": loss / tokens, "eval/token_accuracy": correct / tokens}

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()
