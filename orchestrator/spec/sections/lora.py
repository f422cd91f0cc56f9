"""The lora section: the adapter."""

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.spec.sections.section import PositiveInt, Section


class LoraSection(Section):
    """The adapter (LoRA, arXiv 2106.09685)."""

    rank: PositiveInt = 16
    """Inner dimension r of the update B A."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the adapter's input set to zero in training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the adapted linear layers, or all of them but the head."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases train."""
