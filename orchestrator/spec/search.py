"""The search section: a space over dotted fields, the algorithm that draws from it, and the budget."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.spec.axes import Axis
from orchestrator.spec.sections import PositiveInt, RootSection, Section, Seed
from orchestrator.spec.sections.scheduler import FIELDS_OF_KIND
from orchestrator.words import counted

MODEL_BASED = ("auto", "optuna", "hyperopt", "bohb")
"""Algorithms that learn from what earlier trials have reported."""

LOSS = "eval/loss"
"""The metric that every trial has."""

BETTER_END: dict[str, Literal["min", "max"]] = {
    LOSS: "min",
    "eval/token_accuracy": "max",
    "eval/exact_match": "max",
}
"""Metric -> its better end. The better end of a user's own metric is that of `search.mode`."""

RATE = "training.learning_rate"
SEED = "training.seed"

_NOT_ALGORITHMS = {
    "tpe": "is a sampler of optuna: write algorithm: optuna, sampler: tpe",
    "cmaes": "is a sampler of optuna: write algorithm: optuna, sampler: cmaes",
    **dict.fromkeys({*FIELDS_OF_KIND} - {"none", "bohb"}, "is a scheduler: write it as scheduler.kind"),
}


class Budget(Section):
    """Limits on what all trials together may spend. Once one is reached, no trial starts and each ends at its next
    evaluation."""

    wall_clock_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours since the first step of any trial; interruptions and the loading of workers do not count."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of the GPUs that trials hold; trials that share a GPU count their share of it."""
    tokens: PositiveInt | None = None
    """Real (not padding) tokens trained on."""


def _share(written: Any) -> Any:
    """Return a share that is written as a percentage, such as 0.3%, as a number."""
    if not isinstance(written, str):
        return written
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", written)
    if found is None:
        raise PydanticCustomError("share", "must be a share, such as 0.3% or 0.003")
    return float(found[1]) / 100


Share = Annotated[
    float,
    BeforeValidator(_share),
    Field(gt=0, lt=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"},
            ]
        }
    ),
]
"""A share of something, as a number between 0 and 1 or as a percentage."""


class Stop(Section):
    """When the sweep ends itself: it then draws no further trial, and those that run end as their scheduler decides.
    Either rule is enough."""

    gain: Share | None = None
    """Least gain that another trial must promise, as a share of the best value, such as 0.3%. A Gaussian process on the
    results so far says what it is expected to gain."""
    unmoved: PositiveInt | None = None
    """Trials that may end without a new leader. A new leader that the held-out rows cannot tell apart from the one
    before does not count."""
    min_trials: PositiveInt = 12
    """Trials that must have ended before a rule may act."""

    @property
    def is_set(self) -> bool:
        """Whether the sweep may end itself."""
        return self.gain is not None or self.unmoved is not None

    @property
    def first_end(self) -> int:
        """Smallest number of ended trials after which the sweep may end itself."""
        return self.min_trials if self.gain is not None else max(self.min_trials, (self.unmoved or 0) + 1)


class SearchSection(RootSection):
    """Which trials there are, and which of them is the best."""

    algorithm: Literal["auto", "grid", "random", "optuna", "hyperopt", "bohb"] = "auto"
    """Begin where good values are believed to lie and follow a model of the results (auto), draw every combination
    (grid), independently (random), or by a model alone: optuna, hyperopt's TPE, BOHB's KDE. Default under schedulers
    hyperband, pbt and pb2: random."""
    sampler: Literal["tpe", "cmaes"] | None = None
    """Sampler of optuna: tpe (default), or cmaes (CMA-ES, arXiv 1604.00772) for spaces of numbers."""
    startup_trials: PositiveInt | None = None
    """Trials before the model proposes points; default auto 3, optuna 10 (cmaes 1), hyperopt 20, bohb one more than
    there are axes at each rung."""
    num_trials: PositiveInt | None = None
    """Maximum number of trials; default 10, or the number of points in the space if that is smaller. A grid has its
    own number. With no space but a number of trials or a budget, `auto` searches a default space."""
    budget: Budget = Budget()
    """Further limits."""
    stop: Stop = Stop()
    """When the sweep ends itself before its number of trials: `{gain: 0.3%}`, or `{unmoved: 8}`."""
    repeats: PositiveInt = 1
    """Runs of each finalist, which differ in `training.seed`; with 2 or more, `best` compares finalists over rows and
    seeds. Finalists are the best trial and those that cannot be told apart from it, two to four."""
    space: dict[str, Axis] = {}
    """Dotted field -> axis, such as `training.learning_rate: {loguniform: [1e-5, 1e-3]}`."""
    tied: dict[str, str] = {}
    """Dotted field -> arithmetic over other fields, such as `lora.alpha: 2 * lora.rank`."""
    first: list[dict[str, Any]] = []
    """Points to try first: a value for each searched field that exists there."""
    skip_unfit: bool = False
    """Whether points that cannot fit into the GPUs' memory are dropped before their trial begins, so that others are
    drawn instead. Otherwise trl trains such a trial, or it fails. Trials that need trl for another reason, and trials
    on CPUs, are not foreseen."""
    prior: dict[str, Any] | str = {}
    """Dotted field -> value around which `auto` begins. Default: a learning rate by the base's width, the largest rank,
    and the experiment's own values of other fields. `auto` or the path of a file: begin at the best values of earlier
    sweeps, from the library that `orchestrator priors` keeps."""
    metric: str = "eval/loss"
    """Metric by which trials are compared, each at its best evaluation."""
    mode: Literal["min", "max"] | None = None
    """Which end is better: min for eval/loss, max for eval/token_accuracy and eval/exact_match, where the other one is
    refused; max for a metric of your own, unless you write min."""
    seed: Seed = 0
    """Seed of the search algorithm, and of the draws of PBT and PB2. `--seed` overrides it."""

    @field_validator("algorithm", mode="before")
    @classmethod
    def _is_an_algorithm(cls, written: Any) -> Any:
        if isinstance(written, str) and written in _NOT_ALGORITHMS:
            raise ValueError(f"{written} {_NOT_ALGORITHMS[written]}")
        return written

    @field_validator("metric", mode="before")
    @classmethod
    def _one_metric(cls, written: Any) -> Any:
        if isinstance(written, list):
            raise ValueError(
                f"must be one metric, got {written}: schedulers compare trials by one, and each trial keeps the "
                "adapter that is best by it. For the Pareto set: orchestrator best SWEEP --metric A --metric B"
            )
        return written

    @model_validator(mode="after")
    def _mode_is_the_better_end(self) -> Self:
        if self.metric in BETTER_END and self.mode not in (None, self.resolved_mode):
            end = "highest" if self.mode == "max" else "lowest"
            raise ValueError(
                f"mode {self.mode} would choose the trial with the {end} {self.metric}, which is the worst one; "
                f"leave it out, or write mode: {self.resolved_mode}"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_fits_axes(self) -> Self:
        kinds = {path: axis.kind for path, axis in self.space.items()}
        if self.algorithm == "grid":
            if self.num_trials is not None:
                raise ValueError("num_trials is the number of combinations for algorithm grid; leave it out")
            if open_axes := [path for path, axis in self.space.items() if not axis.is_discrete]:
                raise ValueError(f"algorithm grid needs listed values, but {open_axes[0]} is {kinds[open_axes[0]]}")
        elif grids := [path for path, kind in kinds.items() if kind == "grid"]:
            raise ValueError(f"{grids[0]} is a grid axis, but algorithm is {self.algorithm}; use choice")
        if both := sorted(set(self.space) & set(self.tied)):
            raise ValueError(f"{both[0]} is both searched and tied")
        if self.algorithm in MODEL_BASED and self.algorithm != "auto" and not self.space:
            raise ValueError(f"algorithm {self.algorithm} needs a space to search; give one, or use random")
        return self

    @model_validator(mode="after")
    def _settings_fit_algorithm(self) -> Self:
        if self.sampler is not None and self.algorithm != "optuna":
            raise ValueError(f"sampler {self.sampler} belongs to algorithm optuna, but algorithm is {self.algorithm}")
        if self.startup_trials is not None and self.algorithm not in MODEL_BASED:
            raise ValueError(f"startup_trials belongs to {', '.join(MODEL_BASED)}, but algorithm is {self.algorithm}")
        if self.repeats > 1 and (SEED in self.space or SEED in self.tied):
            how = "searched" if SEED in self.space else "tied"
            raise ValueError(f"repeats differ in {SEED}, which is {how} here; take it out of search")
        if self.prior and self.algorithm != "auto":
            raise ValueError(f"prior belongs to algorithm auto, but algorithm is {self.algorithm}; leave it out")
        if self.startup_trials is not None and self.startup_trials >= self.total_trials:
            trials = counted(self.total_trials, "trial")
            raise ValueError(
                f"startup_trials come before the model's own, and {self.startup_trials} of {trials} leave none for "
                f"{self.algorithm}; give fewer, or algorithm random"
            )
        least = len(self.space) + 1
        if self.algorithm == "bohb" and self.startup_trials is not None and self.startup_trials < least:
            raise ValueError(
                f"startup_trials must be at least {least} for bohb, one more than there are axes: its density models "
                f"have one dimension for each axis (got {self.startup_trials})"
            )
        if self.sampler == "cmaes":
            self._cmaes_can_search()
        return self

    @model_validator(mode="after")
    def _stop_can_act(self) -> Self:
        stop, total = self.stop, self.total_trials
        if not stop.is_set:
            return self
        if stop.first_end >= total:
            raise ValueError(
                f"stop could end no search of {counted(total, 'trial')}: it acts once {stop.first_end} have ended; "
                "give more trials, or a smaller stop.min_trials or stop.unmoved"
            )
        conditional = next((path for path, axis in self.space.items() if axis.when), None)
        if stop.gain is not None and conditional is not None:
            raise ValueError(
                f"stop.gain needs a model of all fields together, but {conditional} has `when`; use stop.unmoved"
            )
        return self

    def _cmaes_can_search(self) -> None:
        """CMA-ES draws from a normal distribution over numbers; optuna would draw anything else at random."""
        for path, axis in self.space.items():
            if axis.is_discrete:
                raise ValueError(f"sampler cmaes searches numbers, but {path} is {axis.kind}; use a range, or tpe")
            if axis.when:
                raise ValueError(f"sampler cmaes searches all fields together, but {path} has `when`; use tpe")
        if len(self.space) < 2:
            raise ValueError(f"sampler cmaes needs two or more axes, got {len(self.space)}; use tpe")

    @model_validator(mode="after")
    def _conditions_hold(self) -> Self:
        for path, axis in self.space.items():
            if axis.when is None:
                continue
            ((parent, values),) = axis.when.items()
            if parent not in self.space or not self.space[parent].is_discrete:
                listed = [name for name, other in self.space.items() if other.is_discrete and name != path]
                raise ValueError(
                    f"space.{path}: when needs a searched field with listed values, got {parent}; "
                    f"available: {', '.join(listed) or 'none'}"
                )
            if wrong := [value for value in values if not self.space[parent].holds(value)]:
                raise ValueError(f"space.{path}: {wrong[0]!r} is not a value of {parent}: {self.space[parent].values}")
            if path in self.ancestors(path):
                raise ValueError(f"space.{path}: exists only if {parent} does, which exists only if {path} does")
        return self

    @model_validator(mode="after")
    def _first_points_are_points(self) -> Self:
        if self.first and self.algorithm == "grid":
            raise ValueError("first names points to try first, but algorithm grid tries all; leave it out")
        if len(self.first) > self.total_trials:
            trials = counted(self.total_trials, "trial")
            raise ValueError(f"first holds {len(self.first)} points for {trials}; give num_trials of {len(self.first)}")
        for i, point in enumerate(self.first):
            if point in self.first[:i]:
                raise ValueError(f"first.{i} repeats first.{self.first.index(point)}: {point}")
            if unknown := sorted(set(point) - set(self.space)):
                raise ValueError(f"first.{i}: {unknown[0]} is not searched; axes: {', '.join(self.space) or 'none'}")
            active = self.active(point)
            if missing := [path for path in self.space if path not in point and self._exists(path, point)]:
                raise ValueError(f"first.{i}: needs a value for {missing[0]}")
            if idle := sorted(set(point) - set(active)):
                raise ValueError(
                    f"first.{i}: {idle[0]} does not exist there: it is searched when {self._when(idle[0])}"
                )
            for path, value in point.items():
                if not self.space[path].holds(value):
                    raise ValueError(f"first.{i}: {value!r} is not a value of {path}: {self.space[path].model_dump()}")
        return self

    @model_validator(mode="after")
    def _prior_is_on_the_axes(self) -> Self:
        for path, value in self.written_prior.items():
            if path not in self.space:
                raise ValueError(f"prior: {path} is not searched; axes: {', '.join(self.space) or 'none'}")
            if not self.space[path].holds(value):
                raise ValueError(f"prior: {value!r} is not a value of {path}: {self.space[path].model_dump()}")
        return self

    @property
    def written_prior(self) -> dict[str, Any]:
        """The prior's values; {} for one that is read from a library when the sweep starts."""
        return {} if isinstance(self.prior, str) else self.prior

    @property
    def learns(self) -> bool:
        """Whether trials are chosen by what earlier ones have reported."""
        return self.algorithm in MODEL_BASED and bool(self.space)

    @property
    def total_trials(self) -> int:
        """Maximum number of trials in the sweep; one if nothing is searched."""
        if self.algorithm == "grid" or not self.space:
            return int(self.num_points)
        return self.num_trials or int(min(10, self.num_points))

    @property
    def num_points(self) -> float:
        """Number of different points in the space; infinity if an axis is a range of real numbers."""
        return math.prod(self._num_points_at(path) for path, axis in self.space.items() if axis.when is None)

    def _num_points_at(self, path: str) -> float:
        """Return the number of values of a field, combined with those of fields that exist only with some of them."""
        values = self.space[path].all_values()
        if values is None:
            return math.inf
        children = [(name, axis.when[path]) for name, axis in self.space.items() if axis.when and path in axis.when]
        if not children or not self.space[path].is_discrete:
            return len(values)
        return sum(
            math.prod(self._num_points_at(name) for name, with_values in children if _holds(with_values, value))
            for value in values
        )

    @property
    def resolved_mode(self) -> Literal["min", "max"]:
        """Which end of the metric is better."""
        return BETTER_END.get(self.metric) or self.mode or "max"

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield each point of a space once; the space must have no range of real numbers.

        Combinations that differ only in fields that do not exist there are the same point.
        """
        seen = set()
        for values in itertools.product(*(axis.all_values() or () for axis in self.space.values())):
            point = self.active(dict(zip(self.space, values, strict=True)))
            if repr(point) not in seen:
                seen.add(repr(point))
                yield point

    def active(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a point that exist there, as the axes' `when` says."""
        return {path: value for path, value in point.items() if path not in self.space or self._exists(path, point)}

    def decode(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the point for a searcher's draws, see `Axis.domain`."""
        return self.active({path: axis.decode(drawn[path]) for path, axis in self.space.items() if path in drawn})

    def ancestors(self, path: str) -> list[str]:
        """Return the fields on which the existence of a field depends, the nearest first."""
        found: list[str] = []
        parent = self.space[path].parent
        while parent in self.space and parent not in found:
            found.append(parent)
            parent = self.space[parent].parent
        return found

    def needed(self, path: str) -> dict[str, Any]:
        """Return values of other fields with which a field exists."""
        chain = [self.space[each].when or {} for each in (path, *self.ancestors(path))]
        return {parent: values[0] for when in chain for parent, values in when.items()}

    def _exists(self, path: str, point: Mapping[str, Any]) -> bool:
        when = self.space[path].when
        if when is None:
            return True
        ((parent, values),) = when.items()
        return parent in point and _holds(values, point[parent]) and self._exists(parent, point)

    def _when(self, path: str) -> str:
        when = self.space[path].when or {}
        return " and ".join(f"{parent} is {' or '.join(map(str, values))}" for parent, values in when.items())


def _holds(values: list[Any], wanted: Any) -> bool:
    """Whether a value is in a list; True and 1 are different values."""
    return repr(wanted) in [repr(value) for value in values]
