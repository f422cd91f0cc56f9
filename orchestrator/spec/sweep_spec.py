"""The whole experiment, and how one trial's configuration is drawn from it."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from orchestrator.embedded.task import COLUMNS
from orchestrator.spec.dotted import read_path, write_keys
from orchestrator.spec.pairs import check_pairs, check_trials
from orchestrator.spec.probing import check_axes, combinations
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
)
from orchestrator.spec.sections.scheduler import Brackets, NoScheduler, Population, Rungs
from orchestrator.spec.ties import evaluate_tie

TRIAL_SECTIONS = ("base", "data", "lora", "training", "evaluation")


class SweepSpec(Section):
    """A resolved experiment file."""

    base: BaseSection
    """The base model."""
    data: DataSection
    """Training and held-out rows."""
    lora: LoraSection = LoraSection()
    """The adapter."""
    training: TrainingSection = TrainingSection()
    """The optimisation."""
    evaluation: EvaluationSection = EvaluationSection()
    """Metrics beside the loss."""
    search: SearchSection = SearchSection()
    """The space of trials."""
    scheduler: SchedulerSection = NoScheduler()
    """Who is stopped, paused or cloned."""
    resources: ResourcesSection = ResourcesSection()
    """Cluster resources."""
    tracking: TrackingSection = TrackingSection()
    """Views of the records."""
    output: OutputSection = OutputSection()
    """The sweep's folder."""

    @model_validator(mode="after")
    def _metrics_can_be_measured(self) -> Self:
        if self.evaluation.metrics and self.data.format == "text":
            raise ValueError(f"evaluation.metrics {self.evaluation.metrics} need prompts; data.format text has none")
        known = ["eval/loss", "eval/token_accuracy", *(f"eval/{name}" for name in self.evaluation.metrics)]
        if self.search.metric not in known:
            raise ValueError(f"search.metric {self.search.metric!r} is not measured; one of {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _embedded_rows_have_the_columns(self) -> Self:
        for source in (*self.data.sources, *self.data.held_out.sources):
            missing = [column for column in self.data.columns if column not in COLUMNS]
            if source.source == "embedded" and missing:
                raise ValueError(
                    f"data.source embedded: there is no column {missing[0]!r} for format {self.data.format}; "
                    f"columns: {', '.join(COLUMNS)}"
                )
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        check_pairs(self)
        return self

    @model_validator(mode="after")
    def _every_axis_holds(self) -> Self:
        check_axes(self)
        check_trials(self)
        return self

    @property
    def grace_steps(self) -> int:
        """First step at which a scheduler that counts steps may stop a trial."""
        given = self.scheduler.grace_steps if isinstance(self.scheduler, Rungs) else None
        return given or self.training.eval_steps

    @property
    def interval_steps(self) -> int:
        """Steps after which PBT or PB2, where it counts steps, looks at a trial again."""
        given = self.scheduler.interval_steps if isinstance(self.scheduler, Population) else None
        return given or self.training.eval_steps

    def corners(self) -> list[TrialConfig]:
        """Trials that stand for all: each value, or end, of each axis is in one of them."""
        return [self.trial_config(point) for point in self.edges()]

    def corners_on_base(self) -> list[TrialConfig]:
        """Those on the sweep's own base."""
        return [config for config in self.corners() if config.base == self.base]

    def samples(self) -> list[TrialConfig]:
        """The corners, and what stands for all combinations of axes."""
        return [*self.corners(), *map(self.trial_config, combinations(self))]

    def why_not_on_cpu(self) -> str | None:
        """What in one of the trials needs a GPU, or None."""
        return next((reason for config in self.samples() if (reason := config.why_not_on_cpu())), None)

    def edges(self) -> list[dict[str, Any]]:
        """Points that differ from a first one along one axis (and those that it needs to exist)."""
        probes = {path: axis.probes() for path, axis in self.search.space.items()}
        first = {path: values[0] for path, values in probes.items()}
        return [
            self.search.active(first | self.search.needed(path) | {path: value})
            for path, values in probes.items()
            for value in values
        ] or [{}]

    def trial_config(self, point: Mapping[str, Any]) -> TrialConfig:
        """The configuration of one trial.

        Args:
            point: dotted field -> value, one for each axis of the search space; those that do not exist there, as their
                `when` says, are left out.

        Raises:
            ValueError: a value or a tied expression does not fit its field.
        """
        document: dict[str, Any] = self.model_dump(mode="json", include=set(TRIAL_SECTIONS))
        varied = self.search.active(point)
        for path, value in varied.items():
            write_keys(document, path.split("."), value)

        def lookup(path: str) -> Any:
            if path in unresolved:
                raise ValueError(f"reads {path}, which is tied itself; a tie may read only those written before it")
            try:
                return read_path(document, path)
            except (KeyError, TypeError):
                raise ValueError(f"there is no field {path}") from None

        unresolved = set(self.search.tied)
        for path, expression in self.search.tied.items():
            try:
                varied[path] = evaluate_tie(expression, lookup)
            except ValueError as error:
                raise ValueError(f"search.tied.{path} {error}") from error
            write_keys(document, path.split("."), varied[path])
            unresolved.remove(path)
        training = document["training"]
        if isinstance(self.scheduler, Brackets | Population) and training["save_steps"] is None:
            training["save_steps"] = training["eval_steps"]  # trials go on from the checkpoint of an evaluation
        return TrialConfig.model_validate({**document, "varied": varied})
