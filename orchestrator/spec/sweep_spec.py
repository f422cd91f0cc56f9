"""The whole experiment: all sections, checked together."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from orchestrator.embedded.task import COLUMNS
from orchestrator.spec.axis_checks import check_axes
from orchestrator.spec.cross_checks import check_sections_together, check_trials, first_rung_steps, perturbation_steps
from orchestrator.spec.default_search import complete_search
from orchestrator.spec.dotted import read_path
from orchestrator.spec.search import SearchSection
from orchestrator.spec.sections import (
    BaseSection,
    DataSection,
    EvaluationSection,
    LoraSection,
    OutputSection,
    ResourcesSection,
    SchedulerSection,
    Section,
    TrackingSection,
    TrainingSection,
    TrialConfig,
    require_floats,
)
from orchestrator.spec.sections.scheduler import Brackets, ForecastScheduler, NoScheduler, Population
from orchestrator.spec.trial_space import TRIAL_SECTIONS, TrialSpace


def _default_scheduler(search: SearchSection) -> ForecastScheduler | NoScheduler:
    """Return the scheduler of an experiment that names none."""
    if search.total_trials == 1 or search.metric != "eval/loss" or search.algorithm == "bohb":
        return NoScheduler()
    return ForecastScheduler()


class SweepSpec(Section):
    """An experiment file, resolved: every field has a value."""

    base: BaseSection
    """The base model."""
    data: DataSection
    """Training and held-out rows."""
    lora: LoraSection = LoraSection()
    """The adapter."""
    training: TrainingSection = TrainingSection()
    """Optimization."""
    evaluation: EvaluationSection = EvaluationSection()
    """Metrics in addition to the loss."""
    search: SearchSection = SearchSection()
    """The space of trials."""
    scheduler: SchedulerSection = Field(default_factory=lambda sections: _default_scheduler(sections["search"]))
    """Which trials are stopped, paused or cloned. Default: forecast, if trials are searched by their loss; else
    none."""
    resources: ResourcesSection = ResourcesSection()
    """Resources of the cluster."""
    tracking: TrackingSection = TrackingSection()
    """Experiment trackers."""
    output: OutputSection = OutputSection()
    """The sweep's folder."""

    @model_validator(mode="before")
    @classmethod
    def _search_is_complete(cls, written: Any) -> Any:
        require_floats(written)
        return complete_search(written) if isinstance(written, dict) else written

    @model_validator(mode="after")
    def _metrics_can_be_measured(self) -> Self:
        names = self.evaluation.names
        if names and self.data.format == "text":
            raise ValueError(f"evaluation.metrics {', '.join(names)} need prompts; data.format text has none")
        known = ["eval/loss", "eval/token_accuracy", *(f"eval/{name}" for name in names)]
        if self.search.metric not in known:
            raise ValueError(f"search.metric {self.search.metric!r} is not measured; one of {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _embedded_rows_have_the_columns(self) -> Self:
        test = self.data.test.sources if self.data.test else []
        for source in (*self.data.sources, *self.data.held_out.sources, *test):
            missing = [column for column in self.data.columns if column not in COLUMNS]
            if source.source == "embedded" and missing:
                raise ValueError(
                    f"data.source embedded: there is no column {missing[0]!r} for format {self.data.format}; "
                    f"columns: {', '.join(COLUMNS)}"
                )
        return self

    @model_validator(mode="after")
    def _sections_go_together(self) -> Self:
        check_sections_together(self.search, self.scheduler, self.training, self.resources)
        return self

    @model_validator(mode="after")
    def _every_trial_is_valid(self) -> Self:
        check_axes(self.trials)
        check_trials(self.search, self.scheduler, self.resources, self.training, self.samples)
        return self

    @property
    def trials(self) -> TrialSpace:
        """The trials that this experiment can have."""
        continues = isinstance(self.scheduler, Brackets | Population)
        return TrialSpace({name: getattr(self, name) for name in TRIAL_SECTIONS}, self.search, continues)

    @property
    def grace_steps(self) -> int:
        """First step at which a scheduler that counts steps may stop a trial."""
        return first_rung_steps(self.scheduler, self.training)

    @property
    def interval_steps(self) -> int:
        """Steps between two decisions of PBT or PB2 about a trial, if they count steps."""
        return perturbation_steps(self.scheduler, self.training)

    @property
    def num_shards(self) -> int:
        """Pieces of the base, each on a GPU of its own; 1 where a process holds the whole base."""
        gpus, strategy = self.resources.gpus_per_trial, self.resources.strategy
        is_fast = self.training.engine == "fast" and "training.engine" not in {*self.search.space, *self.search.tied}
        searches_base = any(name.startswith("base.") for name in {*self.search.space, *self.search.tied})
        is_sharded = strategy == "shard" or (strategy == "auto" and is_fast and not searches_base)
        return gpus if is_sharded and gpus != "auto" and gpus > 1 else 1

    def corners(self) -> list[TrialConfig]:
        """Return trials that represent all others: each value, or end, of each axis is in one of them."""
        return [self.trial_config(point) for point in self.trials.edges()]

    def corners_on_base(self) -> list[TrialConfig]:
        """Return the corners whose base is the sweep's own."""
        return [config for config in self.corners() if config.base == self.base]

    def samples(self) -> list[TrialConfig]:
        """Return the corners, and trials that represent all combinations of axes."""
        return [*self.corners(), *map(self.trial_config, self.trials.combinations())]

    def cpu_unsupported_reason(self) -> str | None:
        """Return what in one of the trials needs a GPU, or None."""
        return next((reason for config in self.samples() if (reason := config.cpu_unsupported_reason())), None)

    def trial_config(self, point: Mapping[str, Any]) -> TrialConfig:
        """Return the configuration of one trial, see `TrialSpace.config`."""
        return self.trials.config(point)

    def point_of(self, config: TrialConfig) -> dict[str, Any] | None:
        """Return the point of a trial in the search space; None if a trial that was added lies outside of it."""
        document, search = config.model_dump(mode="json"), self.search
        point = search.active({path: read_path(document, path) for path in search.space})
        varies_others = not config.varied.keys() <= {*search.space, *search.tied}
        is_inside = not varies_others and all(search.space[path].holds(value) for path, value in point.items())
        return point if is_inside else None
