"""What an export answers, held against the adapter that it was made from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.data.encode import IGNORED
from orchestrator.errors import ExportError

NUM_ROWS = 20
"""Held-out rows that are compared."""

Row = Mapping[str, list[int]]
"""`input_ids` and `labels`, both (tokens,)."""


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from its source.

    Measured on the embedded base, 20 rows, adapters of 100 steps trained in float32 and in bfloat16 (CPU): a right
    merge to bfloat16 is off by 2 to 4% of the largest logit and 0.7% of the loss, to float16 from float32 by 0.4% and
    0.1%: that is the rounding of weights and of products. Wrong ones: a scale that is off by 5%, 14% of the largest
    logit; one layer left out, 29%; the original weights in place of the dequantised ones, 17%. An adapter that changes
    little is not told from its rounding by this: that each weight is right is for the tests of `merge`, to the bit.
    """

    logits: float
    """Of the source's largest logit."""
    loss: float
    """Of the source's loss, beside `LEAST_LOSS`."""


LEAST_LOSS = 0.002
"""A difference of the loss that is never too much: that of an adapter which has learned its rows by heart is near 0."""

SAME = Tolerance(logits=1e-3, loss=1e-3)
"""For the same weights in the same form."""
ROUNDED = {"bfloat16": Tolerance(logits=0.08, loss=0.02), "float16": Tolerance(logits=0.02, loss=0.005)}
"""By the coarser type of the two models: bfloat16 rounds eight times as coarsely as float16."""


@dataclass(frozen=True)
class Parity:
    """Source and export on the same rows."""

    max_logit_difference: float
    """Over all tokens of the rows and the whole vocabulary."""
    largest_logit: float
    """Of the source, without its sign."""
    loss_source: float
    """Mean over the tokens that have a loss."""
    loss_exported: float
    num_rows: int

    def as_dict(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.max_logit_difference:.4g} (of logits up to {self.largest_logit:.4g}), "
            f"loss {self.loss_exported:.6g} for {self.loss_source:.6g}, on {self.num_rows} held-out rows"
        )

    def require(self, tolerance: Tolerance) -> None:
        """Raises ExportError where the export is further from its source than that."""
        most_logits = tolerance.logits * self.largest_logit
        most_loss = tolerance.loss * self.loss_source + LEAST_LOSS
        near = self.max_logit_difference <= most_logits  # NaN is not
        if not near or not abs(self.loss_exported - self.loss_source) <= most_loss:
            raise ExportError(
                f"the export does not answer as the adapter does: {self}",
                f"At most {most_logits:.4g} and {most_loss:.4g} are put down to rounding. Nothing was left behind.",
            )


def rounding(*dtypes: str) -> Tolerance:
    """The tolerance for a model of one type that is held against one of another; float32 rounds less than either."""
    return ROUNDED["bfloat16" if "bfloat16" in dtypes else "float16"]


def answers(model: Any, rows: Sequence[Row]) -> list[Any]:
    """Logits (tokens, vocabulary) of each row, on the CPU and in the model's own type."""
    import torch

    model.eval()
    with torch.no_grad():
        # A row at a time: no filler, and no other row, has a part in it.
        return [model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits[0].cpu() for row in rows]


def compare(source: Sequence[Any], exported: Any, rows: Sequence[Row]) -> Parity:
    """Hold a model against the logits that its source gave.

    Args:
        source: from `answers`; (tokens, vocabulary) each.
        exported: the model that was loaded back.
        rows: the same rows.
    """
    import torch

    furthest, largest, losses, num_tokens = [], [], [0.0, 0.0], 0
    for row, wanted in zip(rows, source, strict=True):
        (said,) = answers(exported, [row])
        pair = wanted.float(), said.float()
        furthest.append((pair[0] - pair[1]).abs().max())
        largest.append(pair[0].abs().max())
        labels = torch.tensor(row["labels"])[1:]
        for i, logits in enumerate(pair):
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORED, reduction="sum")
            losses[i] += loss.item()
        num_tokens += int((labels != IGNORED).sum())
    # torch's maximum of numbers with a NaN among them is NaN; Python's may not be.
    return Parity(
        max_logit_difference=torch.stack(furthest).max().item(),
        largest_logit=torch.stack(largest).max().item(),
        loss_source=losses[0] / num_tokens,
        loss_exported=losses[1] / num_tokens,
        num_rows=len(rows),
    )
