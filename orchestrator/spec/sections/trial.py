"""One trial's configuration: the sections that a trial has, resolved."""

from typing import Any, Self

from pydantic import model_validator

from orchestrator.spec.sections.base import BaseSection
from orchestrator.spec.sections.data import DataSection
from orchestrator.spec.sections.evaluation import EvaluationSection
from orchestrator.spec.sections.honored import honored_by
from orchestrator.spec.sections.lora import LoraSection
from orchestrator.spec.sections.section import RootSection
from orchestrator.spec.sections.training import TrainingSection


class TrialConfig(RootSection):
    """Everything that is needed to run one trial again."""

    base: BaseSection
    data: DataSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    varied: dict[str, Any] = {}
    """Dotted fields that were searched or tied, with their values."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        base, lora = self.base, self.lora
        if lora.init == "pissa" and base.quantization != "none":
            raise ValueError(
                f"lora.init pissa needs weights that are not quantized (PEFT refuses others), but base.quantization is "
                f"{base.quantization}; set it to none, or use init olora"
            )
        if self.training.precision != "auto":
            reason = self.precision_unsupported_reason(self.training.precision)
            if reason:
                raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _fast_supports_it(self) -> Self:
        if self.training.engine == "fast" and (reason := self.fast_unsupported_reason()):
            raise ValueError(f"training.engine fast does not support {reason}; use auto or trl")
        return self

    @model_validator(mode="after")
    def _packing_fits(self) -> Self:
        if self.data.packing and self.training.group_by_length:
            raise ValueError(
                "training.group_by_length groups nothing: data.packing makes sequences of similar length; drop one"
            )
        if self.data.packing and self.lora.init == "eva":
            raise ValueError("lora.init eva reads single rows, but data.packing joins several in a sequence; drop one")
        return self

    def dequantize_unused_reason(self) -> str | None:
        """Return why training.dequantize, if it is set, has no effect here, or None."""
        if self.training.engine == "trl":
            return "training.engine is trl, which has no such choice"
        if self.base.quantization == "none":
            return "with base.quantization none there is nothing to dequantize"
        return None

    def cpu_unsupported_reason(self) -> str | None:
        """Return what in this configuration needs a GPU, and what to use without one, or None."""
        if self.training.precision == "fp16":
            return "training.precision fp16 (else auto, bf16 or none) scales its gradients on a GPU"
        if self.training.tf32:
            return "training.tf32 (else false) needs a GPU"
        if self.lora.dora and self.base.quantization == "int8":
            return (
                "lora.dora on base.quantization int8 (else nf4 or none) needs a GPU: PEFT loses 8-bit scales on a CPU"
            )
        return None

    def precision_unsupported_reason(self, precision: str) -> str | None:
        """Return why this trial cannot train under a resolved precision (bf16, fp16 or none), or None."""
        dtype, base_dtype = self.training.adapter_dtype, self.base.compute_dtype
        if self.lora.modules_to_save and precision == "none" and dtype != base_dtype:
            return (
                f"lora.modules_to_save under precision none: they train in {dtype} (training.adapter_dtype) between "
                f"layers of {base_dtype} (base.compute_dtype); make the two equal, or set precision: bf16"
            )
        return None

    def fast_unsupported_reason(self) -> str | None:
        """Return the first field that the fast engine does not support, or None. The base may be another reason.

        Follows from what the fields declare (`HonoredBy`), except for two rules.
        """
        for name, section in (("base", self.base), ("lora", self.lora), ("training", self.training)):
            for field, info in type(section).model_fields.items():
                declared, value = honored_by(info), getattr(section, field)
                if not declared.fast_supports(value, info.default):
                    return f"{name}.{field}{f' {value}' if isinstance(value, str) else ''}"
        training = self.training
        if "bit" in training.optimizer and training.adapter_dtype != "float32":
            return f"training.optimizer {training.optimizer} with adapter_dtype bfloat16"
        return None

    def dotted(self) -> dict[str, Any]:
        """Return dotted field -> plain value, for readers without nesting."""
        sections = self.model_dump(mode="json", exclude={"varied"})
        return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
