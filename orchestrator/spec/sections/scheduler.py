"""The scheduler section: who is stopped, paused or cloned, and when. Each kind has its own fields."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section


class NoScheduler(Section):
    """All trials run to their end."""

    kind: Literal["none"] = "none"
    """Which scheduler."""


def _require_one_unit(name: str, steps: int | None, tokens: int | None) -> None:
    if steps is not None and tokens is not None:
        raise ValueError(f"time is steps or tokens: give {name}_steps ({steps}) or {name}_tokens ({tokens}), not both")


class _Rungs(Section):
    """Time is optimizer steps, or tokens where these are given."""

    kind: str
    grace_steps: PositiveInt | None = None
    """No trial is stopped before this step, the first rung; default eval_steps."""
    grace_tokens: PositiveInt | None = None
    """The same in tokens: a trial is looked at at its first evaluation from there on."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        _require_one_unit("grace", self.grace_steps, self.grace_tokens)
        return self

    @property
    def counts(self) -> Literal["step", "tokens"]:
        """What time is."""
        return "step" if self.grace_tokens is None else "tokens"


class AshaScheduler(_Rungs):
    """Asynchronous successive halving (arXiv 1810.05934): trials below a rung's best are stopped as they reach it."""

    kind: Literal["asha"] = "asha"
    """Which scheduler."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One in so many trials passes a rung; rungs lie at the grace period times its powers."""


class MedianScheduler(_Rungs):
    """The median stopping rule (Vizier, KDD 2017)."""

    kind: Literal["median"] = "median"
    """Which scheduler."""
    min_trials: PositiveInt = 3
    """Trials to compare with before any is stopped."""


class _Brackets(_Rungs):
    """Trials of a bracket wait at a rung for each other; the best go on from their checkpoints, the others end."""

    max_steps: PositiveInt | None = None
    """Steps of a whole trial, from which rungs are counted down; default training.steps."""
    max_tokens: PositiveInt | None = None
    """The same in tokens; needed with grace_tokens."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One in so many trials passes a rung, each rung is so many times as far as the one before."""

    @model_validator(mode="after")
    def _maximum_in_the_same_unit(self) -> Self:
        if self.counts == "step" and self.max_tokens is not None:
            raise ValueError(f"max_tokens ({self.max_tokens}) needs grace_tokens: time is steps or tokens")
        if self.counts == "tokens" and (self.max_tokens is None or self.max_steps is not None):
            raise ValueError(f"grace_tokens ({self.grace_tokens}) needs max_tokens, the tokens of a whole trial")
        return self


class HyperBandScheduler(_Brackets):
    """HyperBand (arXiv 1603.06560): brackets from no rung at all to one at the grace period, filled in that order."""

    kind: Literal["hyperband"] = "hyperband"
    """Which scheduler."""


class BohbScheduler(_Brackets):
    """HyperBand for search.algorithm bohb (arXiv 1807.01774): the largest bracket first, trials drawn as it fills."""

    kind: Literal["bohb"] = "bohb"
    """Which scheduler."""


class _Population(Section):
    """All trials train side by side; the worst go on from the state of the best, with other values."""

    kind: str
    interval_steps: PositiveInt | None = None
    """Steps between two looks at a trial; default eval_steps."""
    interval_tokens: PositiveInt | None = None
    """The same in tokens: at its first evaluation after so many."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the trials, from below, that take the state of one of as many from above."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        _require_one_unit("interval", self.interval_steps, self.interval_tokens)
        return self

    @property
    def counts(self) -> Literal["step", "tokens"]:
        """What time is."""
        return "step" if self.interval_tokens is None else "tokens"


class PbtScheduler(_Population):
    """Population based training (arXiv 1711.09846). Values of a range are multiplied, listed ones go one place on."""

    kind: Literal["pbt"] = "pbt"
    """Which scheduler."""
    resample_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How often a value is drawn anew instead."""
    factors: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)] = [1.2, 0.8]
    """A value of a range is multiplied by one of these, and kept within the range."""


class Pb2Scheduler(_Population):
    """Population based bandits (arXiv 2002.02518): new values by a Gaussian process of what values have gained."""

    kind: Literal["pb2"] = "pb2"
    """Which scheduler."""


_KINDS: tuple[type[Section], ...] = (
    NoScheduler,
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
