"""The training and evaluation sections."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section


class TrainingSection(Section):
    """One trial's optimisation. Steps are optimizer steps."""

    steps: PositiveInt | None = None
    """Optimizer steps; or give epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; default 1 where steps is not given."""
    batch_size: PositiveInt = 4
    """Rows a forward pass."""
    accumulation: PositiveInt = 1
    """Forward passes an optimizer step."""
    eval_batch_size: PositiveInt = 8
    """Rows a forward pass in evaluation and generation."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = "cosine"
    """Learning rate over the steps."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Share of the steps (below 1) or number of steps (1 and above); schedule constant has none."""
    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adafactor",
        "sgd",
    ] = "adamw_torch_fused"
    """Optimizer by its transformers name."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.3
    """Clip the gradient to this norm; 0 clips nothing."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay (decoupled in AdamW)."""
    engine: Literal["auto", "fast", "trl"] = "auto"
    """trl is its SFTTrainer as it is; fast is the same training, many times sooner; auto is fast where it can be."""
    recompute: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward: less memory, more work; auto where they do not fit (trl: never)."""
    dequantise: Literal["auto", "once", "per_layer"] = "auto"
    """fast: dequantise the base once and keep it, or at each use (less memory, slower); auto keeps it if it fits."""
    group_by_length: bool = False
    """Batch rows of like length."""
    eval_steps: PositiveInt = 50
    """Evaluate every so many steps, and after the last."""
    logging_steps: PositiveInt = 10
    """Record training figures every so many steps."""
    save_steps: PositiveInt | None = None
    """Save a checkpoint every so many steps; default eval_steps."""
    seed: int = 0
    """Seed of the adapter's start, the order of rows and dropout."""
    precision: Literal["auto", "bf16", "fp16", "none"] = "auto"
    """Autocast of the forward pass; auto is bf16 on a GPU that has it, none elsewhere."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the adapter's weights (trl alone would use bfloat16 on a quantised base)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs})")
        if self.steps is not None and self.warmup >= max(1, self.steps):
            raise ValueError(f"warmup ({self.warmup:g} steps) must end before the last step ({self.steps})")
        if self.precision == "fp16" and self.adapter_dtype == "bfloat16":
            raise ValueError("precision fp16 scales gradients, which bfloat16 adapters cannot take; use float32")
        return self


class EvaluationSection(Section):
    """What is measured on the held-out rows beside the loss and the token accuracy."""

    metrics: list[Literal["exact_match"]] = []
    """Generation metrics, taken with the best adapter of COMPLETE trials (at every evaluation if searched for)."""
    rows: PositiveInt = 64
    """Held-out prompts that are answered."""
    max_new_tokens: PositiveInt = 64
    """Tokens an answer may have."""
