"""The lora section: the adapter."""

import math
import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.honored import ENGINES, TRL_ONLY, HonoredBy
from orchestrator.spec.sections.section import PositiveInt, Section

Alpha = Annotated[float, Field(gt=0)]
LayerName = Annotated[str, Field(min_length=1)]


class LoraSection(Section):
    """The adapter (LoRA, arXiv 2106.09685)."""

    rank: Annotated[PositiveInt, ENGINES] = 16
    """Rank r: the inner dimension of the update B A."""
    alpha: Annotated[Alpha, ENGINES] = 32
    """The update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), ENGINES] = 0.05
    """Probability with which each input of the adapter is set to zero in training."""
    target_modules: Annotated[Literal["all-linear"] | Annotated[list[str], Field(min_length=1)], ENGINES] = "all-linear"
    """Names of the linear layers that are adapted, or all of them except the head. Fused experts are adapted if
    they are named: `experts`, or one of their parameters, such as `experts.down_proj`."""
    layers_to_transform: Annotated[
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None, ENGINES
    ] = None
    """Numbers of the decoder layers that are adapted, from 0. Default: all."""
    rank_pattern: Annotated[dict[LayerName, PositiveInt], ENGINES] = {}
    """Ranks of single layers, by the end of their name or a regular expression for it: `down_proj: 32`."""
    alpha_pattern: Annotated[dict[LayerName, Alpha], ENGINES] = {}
    """Alphas of single layers, as in rank_pattern."""
    bias: Annotated[Literal["none", "lora_only", "all"], TRL_ONLY] = "none"
    """Which biases train."""
    modules_to_save: Annotated[Annotated[list[LayerName], Field(min_length=1)] | None, TRL_ONLY] = None
    """Names of modules that train in full and are saved with the adapter, such as lm_head, embed_tokens or norm."""
    rslora: Annotated[bool, ENGINES] = False
    """Multiply the update by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dora: Annotated[bool, TRL_ONLY] = False
    """Also train the magnitudes of the rows of adapted weights (DoRA, arXiv 2402.09353)."""
    init: Annotated[
        Literal["default", "gaussian", "eva", "olora", "pissa"],
        HonoredBy(fast=True, trl=True, fast_values=("default", "gaussian")),
    ] = "default"
    """Initial weights. default, gaussian: A uniform or gaussian, B zero. eva (arXiv 2410.07170): A from the layers'
    inputs on training rows. olora (arXiv 2406.01775), pissa (arXiv 2404.02948): A and B from the base's weights, from
    which this part is subtracted."""

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor of the update in a layer with this rank and alpha."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def names_experts(self) -> bool:
        """Whether target_modules names fused experts or their parameters. They are called experts in all families.

        A number after this word, as in `experts.0.w1`, names a linear layer of a single expert.
        """
        return isinstance(self.target_modules, list) and any(map(_names_fused_experts, self.target_modules))

    @property
    def starts_from_base(self) -> bool:
        """Whether the initial update is a part of the base's weights, which must be subtracted from the base."""
        return self.init in ("olora", "pissa")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.dora and self.starts_from_base:
            raise ValueError(
                f"dora takes its magnitudes from the whole base, but init {self.init} subtracts a part of it; drop one"
            )
        if self.names_experts:
            self._require_plain_lora()
        for field in ("layers_to_transform", "target_modules", "modules_to_save"):
            names = getattr(self, field)
            if isinstance(names, list) and len(set(names)) < len(names):
                raise ValueError(f"{field} contains an entry twice: {names}")
        both = sorted(set(self.modules_to_save or ()) & set(self.target_modules))  # single letters are no modules
        if both:
            raise ValueError(f"{both[0]} is in target_modules and in modules_to_save: adapt it or train it in full")
        for field, pattern in [("rank_pattern", name) for name in self.rank_pattern] + [
            ("alpha_pattern", name) for name in self.alpha_pattern
        ]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
        if self.target_modules != "all-linear" and "lm_head" in self.target_modules:
            raise ValueError(
                "target_modules contains lm_head, whose adapter trl (1.16) would not train; put it into modules_to_save"
            )
        return self

    def _require_plain_lora(self) -> None:
        """Raise ValueError if fused experts should be adapted in a way that PEFT cannot (0.21, `ParamWrapper`)."""
        not_for_experts = {
            "dropout": (self.dropout, "set dropout: 0"),
            "dora": (self.dora, "set dora: false"),
            "init": (self.init if self.init not in ("default", "gaussian") else None, "use default or gaussian"),
            "bias": (self.bias if self.bias != "none" else None, "set bias: none"),
        }
        for field, (value, remedy) in not_for_experts.items():
            if value:
                raise ValueError(
                    f"target_modules names experts, whose adapters cannot be combined with {field} "
                    f"{str(value).lower()}; {remedy}, or take the experts out"
                )


def _names_fused_experts(target: str) -> bool:
    _, experts, inside = f".{target}.".partition(".experts.")
    return bool(experts) and not any(part.isdigit() for part in inside.split("."))
