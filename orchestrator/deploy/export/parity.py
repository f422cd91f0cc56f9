"""What an export answers, held against the adapter that it was made from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.data.encode import IGNORED
from orchestrator.errors import ExportError

NUM_ROWS = 20
"""Held-out rows that are compared."""

NUM_TOKENS = 256
"""Tokens of a row, the last that have a loss: each has logits as many as the vocabulary, which are kept meanwhile."""

Row = Mapping[str, list[int]]
"""`input_ids` and `labels`, both (tokens,)."""


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from its source.

    Measured on the embedded base, 20 rows, five adapters of the demo, and those at a tenth and a hundredth of their
    strength, float32 and bfloat16 (CPU). Right merges to bfloat16 are off by up to 0.7% of the logits (rms; once 1%,
    with logits of float16 beside those of bfloat16), to float16 from float32 by up to 0.06%, whatever the adapter's
    strength; 32 random layers round 1.7 times as much as 4. Wrong merges, where the adapter moves the logits by 27
    to 81%: a scale that is off by 5%, 1.2 to 3.4%; one matrix of 28 left out, 1.2 to 15%; the original weights in place
    of the dequantised ones, 3.3 to 5.3%; one layer of four left out, 9 to 40%; the adapter left out, all that it moves.
    That each weight is right is for the tests of `merge`, to the bit.
    """

    rms: float
    """Of the source's logits, times the root of the number of layers, each of which rounds."""
    logits: float
    """Largest difference, of the source's largest logit, times the same root: a fault of single tokens shows here
    alone. Right merges to bfloat16 are off by up to 3.2% at 4 layers, and by 9% at 32 (7B's shape, random weights)."""
    loss: float
    """Of the source's loss, beside `LEAST_LOSS`."""


LEAST_LOSS = 0.005
"""A difference of the loss that is never too much: rounding to bfloat16 took 0.0025 from one of 0.046."""

SAME = Tolerance(rms=5e-4, logits=5e-4, loss=1e-3)
"""For the same weights in the same form."""
ROUNDED = {
    "bfloat16": Tolerance(rms=0.0075, logits=0.04, loss=0.02),
    "float16": Tolerance(rms=0.0015, logits=0.01, loss=0.005),
}
"""By the coarser type of the two models: bfloat16 rounds eight times as coarsely as float16."""


@dataclass(frozen=True)
class Source:
    """What an adapter answers on its base."""

    logits: list[Any]
    """Of each row's compared tokens, (tokens, vocabulary), on the CPU and in the model's own type."""
    effect: float
    """What the adapter moves: rms of its logits minus those of the base alone, as a share of the rms of its logits."""


@dataclass(frozen=True)
class Parity:
    """Source and export on the same rows."""

    difference: float
    """Rms of the difference of their logits, as a share of the rms of the source's."""
    effect: float
    """See `Source`."""
    max_logit_difference: float
    """Over all compared tokens and the whole vocabulary."""
    largest_logit: float
    """Of the source, without its sign."""
    loss_source: float
    """Mean over the compared tokens."""
    loss_exported: float
    num_rows: int
    num_layers: int

    @property
    def is_seen(self) -> bool:
        """Whether the adapter is seen in the export; one that was left out differs by as much as it moves."""
        return self.difference < self.effect / 2

    def as_dict(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.2%} (rms; the adapter moves them by {self.effect:.2%}), at most by "
            f"{self.max_logit_difference:.4g} (of logits up to {self.largest_logit:.4g}), loss "
            f"{self.loss_exported:.6g} for {self.loss_source:.6g}, on {self.num_rows} held-out rows"
        )

    def require(self, tolerance: Tolerance) -> None:
        """Raises ExportError where the export is further from its source than that."""
        depth = math.sqrt(self.num_layers)
        most_rms = tolerance.rms * depth
        most_logits = tolerance.logits * depth * self.largest_logit
        most_loss = tolerance.loss * self.loss_source + LEAST_LOSS
        bounds = [
            (self.difference, most_rms),
            (self.max_logit_difference, most_logits),
            (abs(self.loss_exported - self.loss_source), most_loss),
        ]
        if not all(found <= most for found, most in bounds):  # NaN is not
            raise ExportError(
                f"the export does not answer as the adapter does: {self}",
                f"At most {most_rms:.2%} (rms), {most_logits:.4g} (of a logit) and {most_loss:.4g} (of the loss) "
                "are put down to rounding. Nothing was left behind.",
            )


def rounding(*dtypes: str) -> Tolerance:
    """The tolerance for a model of one type that is held against one of another; float32 rounds less than either."""
    return ROUNDED["bfloat16" if "bfloat16" in dtypes else "float16"]


def ask(model: Any, rows: Sequence[Row]) -> Source:
    """Have an adapter answer, and its base alone.

    Args:
        model: a `PeftModel`.
        rows: each with a token that has a loss.
    """
    logits, moved, whole = [], [0.0], [0.0]
    for row in rows:
        said = _logits(model, row)
        with model.disable_adapter():
            alone = _logits(model, row)
        logits.append(said)
        moved.append(_norm(said.float() - alone.float()))
        whole.append(_norm(said.float()))
    return Source(logits, math.hypot(*moved) / math.hypot(*whole))


def measure_parity(source: Source, exported: Any, rows: Sequence[Row]) -> Parity:
    """Hold a model against the logits that its source gave.

    Args:
        source: from `ask`.
        exported: the model that was loaded back.
        rows: the same rows.
    """
    import torch

    furthest, largest, losses, num_tokens = [], [], [0.0, 0.0], 0
    apart, whole = [0.0], [0.0]
    for row, wanted in zip(rows, source.logits, strict=True):
        pair = wanted.float(), _logits(exported, row).float()
        difference = pair[0] - pair[1]
        furthest.append(difference.abs().max())
        largest.append(pair[0].abs().max())
        apart.append(_norm(difference))
        whole.append(_norm(pair[0]))
        targets = torch.tensor(row["labels"])[[place + 1 for place in _places(row)]]
        for i, logits in enumerate(pair):
            losses[i] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        num_tokens += len(targets)
    # torch's maximum of numbers with a NaN among them is NaN; Python's may not be.
    return Parity(
        difference=math.hypot(*apart) / math.hypot(*whole),
        effect=source.effect,
        max_logit_difference=torch.stack(furthest).max().item(),
        largest_logit=torch.stack(largest).max().item(),
        loss_source=losses[0] / num_tokens,
        loss_exported=losses[1] / num_tokens,
        num_rows=len(rows),
        num_layers=exported.config.get_text_config().num_hidden_layers,
    )


def _logits(model: Any, row: Row) -> Any:
    """Logits of a row's compared tokens: it is asked by itself, so that no filler and no other row has a part in it."""
    import torch

    model.eval()
    # What lies on the disk is on meta; accelerate's hooks move the ids to where each layer is worked out.
    device = "cpu" if model.device.type == "meta" else model.device
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"]], device=device)).logits[0, _places(row)].cpu()


def _places(row: Row) -> list[int]:
    """Where the next token has a loss, the last `NUM_TOKENS` of them."""
    return [place for place, label in enumerate(row["labels"][1:]) if label != IGNORED][-NUM_TOKENS:]


def _norm(logits: Any) -> float:
    return float(logits.norm())
