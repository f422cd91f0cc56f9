"""Compare the logits of an export with those of the adapter that it was made from."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.data.encode import IGNORED
from orchestrator.deploy.export.routing import MAX_REROUTED, RouterComparison, RouterRecord, Routing
from orchestrator.errors import ExportError
from orchestrator.upstream import keeps_state

NUM_ROWS = 20
"""Number of held-out rows to compare."""

NUM_TOKENS = 256
"""Maximum number of compared tokens per row, the last ones with a loss. Each keeps a logit per vocabulary entry."""

EncodedRow = Mapping[str, list[int]]
"""A tokenized row: `input_ids` and `labels`, both (tokens,)."""


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the difference between an export and its source.

    Measured on the embedded base with 20 rows, on CPU, in float32 and bfloat16. The adapters were five of the demo, at
    full strength and scaled to a tenth and a hundredth. Rms difference of the logits, relative to their rms:

    - Correct merges to bfloat16: up to 0.7%. One case had 1%, comparing float16 logits with bfloat16 logits.
    - Correct merges from float32 to float16: up to 0.06%. In neither case does the adapter's strength matter.
    - Rounding grows with depth: 32 random layers round 1.7 times as much as 4.
    - Linear attention rounds more: random Qwen3.5 of 2 and 8 layers, half of them linear attention, differ by 1.1 to
      3.1% after correct merges, and by 0.8 to 1.1% of the square root of their layers.
    - Wrong merges, where the adapter moves the logits by 27 to 81%: a scale that is off by 5%, 1.2 to 3.4%; one matrix
      of 28 left out, 1.2 to 15%; original instead of dequantized weights, 3.3 to 5.3%; one layer of four left out,
      9 to 40%; the whole adapter left out, as much as the adapter moves the logits.

    This check finds such faults. The tests of `merge` check that each weight is exact to the bit.
    """

    rms: float
    """Rms difference of the logits, relative to the source's rms; multiplied by sqrt(layers), as each layer rounds."""
    logits: float
    """Largest logit difference, relative to the source's largest logit; multiplied by sqrt(layers).

    Only this bound finds faults of single tokens. Correct merges to bfloat16 differ by up to 3.2% with 4 layers, and
    by 9% with 32 (the shape of a 7B model, random weights).
    """
    loss: float
    """Difference of the loss, relative to the source's loss; `MIN_LOSS_TOLERANCE` is added."""


MIN_LOSS_TOLERANCE = 0.005
"""Absolute difference of the loss that is always allowed. Rounding to bfloat16 lowered a loss of 0.046 by 0.0025."""

RECURRENT_WEIGHT = 6
"""Number of attention layers that round as much as one recurrent layer; see `Tolerance`."""

SAME = Tolerance(rms=5e-4, logits=5e-4, loss=1e-3)
"""Tolerance for the same weights in the same form."""
ROUNDED = {
    "bfloat16": Tolerance(rms=0.0075, logits=0.04, loss=0.02),
    "float16": Tolerance(rms=0.0015, logits=0.01, loss=0.005),
}
"""Tolerances by the coarser type of the two models. bfloat16 rounds eight times as coarsely as float16."""


@dataclass(frozen=True)
class AdapterLogits:
    """Logits of an adapter on its base: the reference that an export is compared with."""

    logits: list[Any]
    """Logits of each row's compared tokens, (tokens, vocabulary), on the CPU and in the model's own type."""
    effect: float
    """Effect of the adapter on the logits: rms(adapter - base alone) / rms(adapter)."""
    routers: RouterRecord | None = None
    """What the routers of a base with experts decided; None for a base without them."""


@dataclass(frozen=True)
class Parity:
    """Comparison of an adapter (the source) with its export, on the same rows."""

    difference: float
    """Rms of the difference of the logits, relative to the rms of the source's logits."""
    effect: float
    """Effect of the adapter, as in `AdapterLogits`."""
    max_logit_difference: float
    """Largest difference over all compared tokens and the whole vocabulary."""
    largest_logit: float
    """Largest absolute logit of the source."""
    loss_source: float
    """Mean over the compared tokens, in nats."""
    loss_exported: float
    num_rows: int
    num_layers: int
    routing: Routing | None = None
    """Comparison of the routers; everything else was computed with the source's choices. None without routers."""
    num_recurrent: int = 0
    """Number of layers that are not attention, such as linear attention."""

    @property
    def is_seen(self) -> bool:
        """Whether the comparison can show that the export contains the adapter.

        An export without the adapter differs by `effect`; this one differs by less than half of that.
        """
        return self.difference < self.effect / 2

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values, as a manifest stores it."""
        plain = asdict(self)
        if self.routing is None:
            del plain["routing"]
        return plain

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.2%} (rms; the adapter moves them by {self.effect:.2%}), at most by "
            f"{self.max_logit_difference:.4g} (of logits up to {self.largest_logit:.4g}), loss "
            f"{self.loss_exported:.6g} for {self.loss_source:.6g}, on {self.num_rows} held-out rows"
            + (f"; with the experts that the adapter chose; {self.routing}" if self.routing else "")
        )

    def require(self, tolerance: Tolerance) -> None:
        """Raise ExportError if the export differs from its source by more than the tolerance."""
        depth = math.sqrt(self.num_layers + (RECURRENT_WEIGHT - 1) * self.num_recurrent)
        most_rms = tolerance.rms * depth
        most_logits = tolerance.logits * depth * self.largest_logit
        most_loss = tolerance.loss * self.loss_source + MIN_LOSS_TOLERANCE
        bounds = [
            (self.difference, most_rms),
            (self.max_logit_difference, most_logits),
            (abs(self.loss_exported - self.loss_source), most_loss),
        ]
        if not all(found <= most for found, most in bounds):  # so that NaN fails
            raise ExportError(
                f"the export does not answer as the adapter does: {self}",
                f"Rounding explains differences of up to {most_rms:.2%} (rms), {most_logits:.4g} (of a logit) and "
                f"{most_loss:.4g} (of the loss). Nothing was left behind.",
            )
        if self.routing is not None and not self.routing.agrees(most_rms):
            wrong = (
                f"; the weights of {', '.join(self.routing.wrong_weights)} differ" if self.routing.wrong_weights else ""
            )
            raise ExportError(
                f"the export does not choose experts as the adapter does: {self.routing}{wrong}",
                f"Rounding explains differences of up to {most_rms:.2%} (rms of the router logits) and "
                f"{MAX_REROUTED:.0%} of the choices. Nothing was left behind.",
            )


def rounding(*dtypes: str) -> Tolerance:
    """Return the tolerance for comparing models of these types. float32 rounds less than the other types."""
    return ROUNDED["bfloat16" if "bfloat16" in dtypes else "float16"]


def ask(model: Any, rows: Sequence[EncodedRow]) -> AdapterLogits:
    """Compute the logits of an adapter, and how far it moves those of its base.

    Args:
        model: a `PeftModel`.
        rows: rows that each have at least one token with a loss.
    """
    logits, moved, whole = [], [0.0], [0.0]
    routers = RouterRecord.of(model)
    for row in rows:
        with routers.recording(model) if routers else nullcontext():
            adapted = _logits(model, row)
        with model.disable_adapter():
            base_alone = _logits(model, row)
        logits.append(adapted)
        moved.append(_norm(adapted.float() - base_alone.float()))
        whole.append(_norm(adapted.float()))
    return AdapterLogits(logits, math.hypot(*moved) / math.hypot(*whole), routers)


def measure_parity(source: AdapterLogits, exported: Any, rows: Sequence[EncodedRow]) -> Parity:
    """Compare a model with the logits of its source.

    Args:
        source: from `ask`.
        exported: the export, loaded as a model.
        rows: the rows given to `ask`.
    """
    import torch

    furthest, largest, losses, num_tokens = [], [], [0.0, 0.0], 0
    apart, whole = [0.0], [0.0]
    routers = RouterComparison(source.routers, exported) if source.routers else None
    for number, (row, expected) in enumerate(zip(rows, source.logits, strict=True)):
        with routers.replaying(number) if routers else nullcontext():
            pair = expected.float(), _logits(exported, row).float()
        difference = pair[0] - pair[1]
        furthest.append(difference.abs().max())
        largest.append(pair[0].abs().max())
        apart.append(_norm(difference))
        whole.append(_norm(pair[0]))
        targets = torch.tensor(row["labels"])[[position + 1 for position in _positions(row)]]
        for i, logits in enumerate(pair):
            losses[i] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        num_tokens += len(targets)
    # torch's max returns NaN if any number is NaN; Python's max may not.
    return Parity(
        difference=math.hypot(*apart) / math.hypot(*whole),
        effect=source.effect,
        max_logit_difference=torch.stack(furthest).max().item(),
        largest_logit=torch.stack(largest).max().item(),
        loss_source=losses[0] / num_tokens,
        loss_exported=losses[1] / num_tokens,
        num_rows=len(rows),
        num_layers=exported.config.get_text_config().num_hidden_layers,
        routing=routers.result() if routers else None,
        num_recurrent=_num_recurrent(exported),
    )


def _num_recurrent(model: Any) -> int:
    """Return the number of a model's layers that are not attention."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return config.num_hidden_layers if keeps_state(model) else 0
    return sum("attention" not in kind or kind == "linear_attention" for kind in kinds)


def _logits(model: Any, row: EncodedRow) -> Any:
    """Return the logits of a row's compared tokens. Each row runs alone: no padding or other row influences it."""
    import torch

    model.eval()
    # Offloaded weights are on meta; accelerate's hooks move the ids to the device of each layer.
    device = "cpu" if model.device.type == "meta" else model.device
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"]], device=device)).logits[0, _positions(row)].cpu()


def _positions(row: EncodedRow) -> list[int]:
    """Return the last `NUM_TOKENS` positions whose next token has a loss."""
    return [position for position, label in enumerate(row["labels"][1:]) if label != IGNORED][-NUM_TOKENS:]


def _norm(logits: Any) -> float:
    return float(logits.norm())
