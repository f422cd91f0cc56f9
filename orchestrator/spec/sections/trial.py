"""One trial's configuration: the sections that a trial has, resolved."""

from typing import Any, Self

from pydantic import model_validator

from orchestrator.spec.sections.base import BaseSection
from orchestrator.spec.sections.data import DataSection
from orchestrator.spec.sections.lora import LoraSection
from orchestrator.spec.sections.section import Section
from orchestrator.spec.sections.training import EvaluationSection, TrainingSection

_FAST_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")


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
    def _sections_fit(self) -> Self:
        base, lora = self.base, self.lora
        if lora.init == "pissa" and base.quantization != "none":
            raise ValueError(
                f"lora.init pissa needs weights that are not quantised (PEFT refuses others), but base.quantization is "
                f"{base.quantization}; use none there, or init olora"
            )
        if self.training.precision != "auto" and (reason := self.why_not_under(self.training.precision)):
            raise ValueError(reason)
        return self

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
        if self.data.packing and self.lora.init == "eva":
            raise ValueError("lora.init eva reads rows alone, and data.packing has several in a sequence; drop one")
        return self

    def why_not_dequantised(self) -> str | None:
        """Why training.dequantise, where it is set, is without effect here; or None."""
        if self.training.engine == "trl":
            return "training.engine is trl, which has none"
        if self.base.quantization == "none":
            return "there is nothing to dequantise with base.quantization none"
        return None

    def why_not_on_cpu(self) -> str | None:
        """What in this configuration needs a GPU, and what to take without one; or None."""
        if self.training.precision == "fp16":
            return "training.precision fp16 (else auto, bf16 or none) scales its gradients on a GPU"
        if self.training.tf32:
            return "training.tf32 (else false) needs a GPU"
        if self.lora.dora and self.base.quantization == "int8":
            return (
                "lora.dora on base.quantization int8 (else nf4 or none) needs a GPU: PEFT loses 8-bit scales on a CPU"
            )
        return None

    def why_not_under(self, precision: str) -> str | None:
        """Why this cannot train under a precision that is resolved (bf16, fp16 or none); or None."""
        dtype, held = self.training.adapter_dtype, self.base.compute_dtype
        if self.lora.modules_to_save and precision == "none" and dtype != held:
            return (
                f"lora.modules_to_save under precision none: they train in {dtype} (training.adapter_dtype) between "
                f"layers of {held} (base.compute_dtype); make the two equal, or set precision: bf16"
            )
        return None

    def why_not_fast(self) -> str | None:
        """What in this configuration the fast engine cannot hold, or None; the base may be another reason."""
        base, lora, training = self.base, self.lora, self.training
        unusual = {
            "base.quantization int8": base.quantization == "int8",
            "base.new_tokens": bool(base.new_tokens),
            f"lora.bias {lora.bias}": lora.bias != "none",
            "lora.dora": lora.dora,
            "lora.modules_to_save": bool(lora.modules_to_save),
            "lora.rank_pattern (a slot has one scale)": bool(lora.rank_pattern),
            "lora.alpha_pattern (a slot has one scale)": bool(lora.alpha_pattern),
            f"lora.init {lora.init}": lora.init not in ("default", "gaussian"),
            f"training.optimizer {training.optimizer}": training.optimizer not in _FAST_OPTIMIZERS,
            f"training.optimizer {training.optimizer} with adapter_dtype bfloat16": (
                "bit" in training.optimizer and training.adapter_dtype != "float32"
            ),
            f"training.loss {training.loss}": training.loss != "nll",
            "training.label_smoothing": training.label_smoothing > 0,
            "training.neftune_alpha": training.neftune_alpha is not None,
            "training.precision fp16": training.precision == "fp16",
            "training.tf32": training.tf32,
        }
        return next((reason for reason, holds in unusual.items() if holds), None)

    def dotted(self) -> dict[str, Any]:
        """Dotted field -> plain value, for readers that know no nesting."""
        sections = self.model_dump(mode="json", exclude={"varied"})
        return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
