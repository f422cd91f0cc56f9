"""One trial's configuration: the sections that a trial has, resolved."""

from typing import Any, Self

from pydantic import model_validator

from orchestrator.spec.sections.base import BaseSection
from orchestrator.spec.sections.data import DataSection
from orchestrator.spec.sections.lora import LoraSection
from orchestrator.spec.sections.section import Section
from orchestrator.spec.sections.training import EvaluationSection, TrainingSection


class TrialConfig(Section):
    """All that is needed to run one trial again."""

    base: BaseSection
    data: DataSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    varied: dict[str, Any] = {}
    """Dotted fields that the search chose or tied, with their values."""

    @model_validator(mode="after")
    def _fast_holds_it(self) -> Self:
        if self.training.engine == "fast" and (reason := self.why_not_fast()):
            raise ValueError(f"training.engine fast cannot hold {reason}; use auto or trl")
        return self

    @model_validator(mode="after")
    def _packing_fits(self) -> Self:
        if self.data.packing and self.training.group_by_length:
            raise ValueError(
                "training.group_by_length has nothing to group: data.packing makes sequences of like length"
            )
        return self

    def why_not_fast(self) -> str | None:
        """What in this configuration the fast engine cannot hold, or None; the base may be another reason."""
        training = self.training
        if self.lora.bias != "none":
            return f"lora.bias {self.lora.bias}"
        if training.optimizer not in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"):
            return f"training.optimizer {training.optimizer}"
        if training.optimizer == "paged_adamw_32bit" and training.adapter_dtype != "float32":
            return "training.optimizer paged_adamw_32bit with adapter_dtype bfloat16"
        if training.precision == "fp16":
            return "training.precision fp16"
        if training.group_by_length:
            return "training.group_by_length (without padding it would gain nothing)"
        return None

    def dotted(self) -> dict[str, Any]:
        """Dotted field -> plain value, for readers that know no nesting."""
        sections = self.model_dump(mode="json", exclude={"varied"})
        return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
