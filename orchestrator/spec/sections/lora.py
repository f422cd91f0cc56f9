"""The lora section: the adapter."""

import math
import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section

Alpha = Annotated[float, Field(gt=0)]
LayerName = Annotated[str, Field(min_length=1)]


class LoraSection(Section):
    """The adapter (LoRA, arXiv 2106.09685)."""

    rank: PositiveInt = 16
    """Inner dimension r of the update B A."""
    alpha: Alpha = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the adapter's input set to zero in training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the adapted linear layers, or all of them but the head."""
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Numbers of the decoder layers that are adapted, from 0; default all."""
    rank_pattern: dict[LayerName, PositiveInt] = {}
    """Ranks of single layers by the end of their name, or a regular expression of it: `down_proj: 32`."""
    alpha_pattern: dict[LayerName, Alpha] = {}
    """The same for alpha."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases train."""
    modules_to_save: Annotated[list[LayerName], Field(min_length=1)] | None = None
    """Names of modules that train whole and are saved with the adapter, such as lm_head, embed_tokens or norm."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitudes of the adapted weights' rows as well (DoRA, arXiv 2402.09353)."""
    init: Literal["default", "gaussian", "eva", "olora", "pissa"] = "default"
    """First weights: A uniform or gaussian, B zero; eva (arXiv 2410.07170): A from what layers read on training rows;
    olora (arXiv 2406.01775), pissa (arXiv 2404.02948): both from the base's weights, which then lack that part."""

    def scale(self, rank: int, alpha: float) -> float:
        """What the update of a layer of this rank and alpha is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def starts_from_base(self) -> bool:
        """Whether the first update is a part of the base's weights, which the base then has to lose."""
        return self.init in ("olora", "pissa")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.dora and self.starts_from_base:
            raise ValueError(
                f"dora takes its magnitudes from the whole base, of which init {self.init} takes a part away"
            )
        for field in ("layers_to_transform", "target_modules", "modules_to_save"):
            names = getattr(self, field)
            if isinstance(names, list) and len(set(names)) < len(names):
                raise ValueError(f"{field} names one twice: {names}")
        if both := sorted(set(self.modules_to_save or ()) & set(self.target_modules)):  # no letter is a module
            raise ValueError(f"{both[0]} is in target_modules and in modules_to_save: adapt it or train it whole")
        for field, pattern in [("rank_pattern", name) for name in self.rank_pattern] + [
            ("alpha_pattern", name) for name in self.alpha_pattern
        ]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
        if self.target_modules != "all-linear" and "lm_head" in self.target_modules:
            raise ValueError(
                "target_modules holds lm_head, whose adapter trl (1.16) would not train; put it into modules_to_save"
            )
        return self
