"""The scheduler section: which trials are stopped, paused or cloned, and when. Each kind has its own fields."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section


class NoScheduler(Section):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"
    """Which scheduler."""


def _require_one_unit(name: str, steps: int | None, tokens: int | None) -> None:
    if steps is not None and tokens is not None:
        raise ValueError(f"time is steps or tokens: give {name}_steps ({steps}) or {name}_tokens ({tokens}), not both")


class _Rungs(Section):
    """A scheduler that compares trials at rungs. Time is optimizer steps, or tokens if `grace_tokens` is given."""

    kind: str
    grace_steps: PositiveInt | None = None
    """No trial is stopped before this step, the first rung. Default: eval_steps."""
    grace_tokens: PositiveInt | None = None
    """The same in tokens: a trial is first compared at its first evaluation after this many."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        _require_one_unit("grace", self.grace_steps, self.grace_tokens)
        return self

    @property
    def counts(self) -> Literal["step", "tokens"]:
        """Unit of time."""
        return "step" if self.grace_tokens is None else "tokens"


class AshaScheduler(_Rungs):
    """Asynchronous successive halving (arXiv 1810.05934): a trial that reaches a rung below its best is stopped."""

    kind: Literal["asha"] = "asha"
    """Which scheduler."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial in this many passes a rung. Rungs are the grace period times powers of this factor."""


class MedianScheduler(_Rungs):
    """The median stopping rule (Vizier, KDD 2017)."""

    kind: Literal["median"] = "median"
    """Which scheduler."""
    min_trials: PositiveInt = 3
    """Number of other trials that must be there to compare with before any trial is stopped."""


class ForecastScheduler(Section):
    """Forecasts each trial's last loss from its curve, its learning rates and all other curves of the sweep. It stops
    trials that have little chance to end below the leader. Where a loss cannot be forecast, it takes the median rule
    and says why."""

    kind: Literal["forecast"] = "forecast"
    """Which scheduler."""
    chance: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """A trial is stopped if its chance to end below the leader is less than this, after two or more evaluations.
    Default: 0.16, or 2.1 / number of trials if that is less."""


class _Brackets(_Rungs):
    """A scheduler whose trials wait at each rung of a bracket for the others. The best continue, the others end."""

    max_steps: PositiveInt | None = None
    """Steps of a whole trial, from which rungs are counted down. Default: training.steps."""
    max_tokens: PositiveInt | None = None
    """The same in tokens; required with grace_tokens."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial in this many passes a rung. Each rung is this many times as long as the one before."""

    @model_validator(mode="after")
    def _maximum_in_the_same_unit(self) -> Self:
        if self.counts == "step" and self.max_tokens is not None:
            raise ValueError(f"max_tokens ({self.max_tokens}) needs grace_tokens: time is steps or tokens")
        if self.counts == "tokens" and (self.max_tokens is None or self.max_steps is not None):
            raise ValueError(f"grace_tokens ({self.grace_tokens}) needs max_tokens, the tokens of a whole trial")
        return self


class HyperBandScheduler(_Brackets):
    """HyperBand (arXiv 1603.06560): brackets from one without rungs to one that begins at the grace period, filled in
    that order."""

    kind: Literal["hyperband"] = "hyperband"
    """Which scheduler."""


class BohbScheduler(_Brackets):
    """HyperBand for search.algorithm bohb (arXiv 1807.01774): the largest bracket first, trials drawn as it is
    filled."""

    kind: Literal["bohb"] = "bohb"
    """Which scheduler."""


class _Population(Section):
    """A scheduler under which all trials train side by side; the worst continue from the state of the best, with other
    values."""

    kind: str
    interval_steps: PositiveInt | None = None
    """Steps between two decisions about a trial. Default: eval_steps."""
    interval_tokens: PositiveInt | None = None
    """The same in tokens: a decision is made at the first evaluation after this many."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the trials at the bottom that continue from the state of one of the same share at the top."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        _require_one_unit("interval", self.interval_steps, self.interval_tokens)
        return self

    @property
    def counts(self) -> Literal["step", "tokens"]:
        """Unit of time."""
        return "step" if self.interval_tokens is None else "tokens"


class PbtScheduler(_Population):
    """Population based training (arXiv 1711.09846). Values of a range are multiplied; listed ones move one place."""

    kind: Literal["pbt"] = "pbt"
    """Which scheduler."""
    resample_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability with which a value is drawn anew instead."""
    factors: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)] = [1.2, 0.8]
    """Factors by one of which a value of a range is multiplied. The result stays within the range."""


class Pb2Scheduler(_Population):
    """Population based bandits (arXiv 2002.02518): new values from a Gaussian process over what values have gained."""

    kind: Literal["pb2"] = "pb2"
    """Which scheduler."""


_KINDS: tuple[type[Section], ...] = (
    NoScheduler,
    ForecastScheduler,
    AshaScheduler,
    HyperBandScheduler,
    BohbScheduler,
    MedianScheduler,
    PbtScheduler,
    Pb2Scheduler,
)
FIELDS_OF_KIND: dict[str, set[str]] = {kind.model_fields["kind"].default: set(kind.model_fields) for kind in _KINDS}
"""Kind -> names of its fields."""


def _kind_of(written: Any) -> str | None:
    kind = written.get("kind", "none") if isinstance(written, dict) else getattr(written, "kind", None)
    return kind if isinstance(kind, str) and kind in FIELDS_OF_KIND else None


SchedulerSection = Annotated[
    Annotated[NoScheduler, Tag("none")]
    | Annotated[ForecastScheduler, Tag("forecast")]
    | Annotated[AshaScheduler, Tag("asha")]
    | Annotated[HyperBandScheduler, Tag("hyperband")]
    | Annotated[BohbScheduler, Tag("bohb")]
    | Annotated[MedianScheduler, Tag("median")]
    | Annotated[PbtScheduler, Tag("pbt")]
    | Annotated[Pb2Scheduler, Tag("pb2")],
    Discriminator(
        _kind_of,
        custom_error_type="scheduler_kind",
        custom_error_message=f"must be a section whose kind is one of {', '.join(FIELDS_OF_KIND)}",
    ),
]
"""Which trials are stopped, paused or cloned."""
Rungs = AshaScheduler | MedianScheduler | HyperBandScheduler | BohbScheduler
Brackets = HyperBandScheduler | BohbScheduler
Population = PbtScheduler | Pb2Scheduler
