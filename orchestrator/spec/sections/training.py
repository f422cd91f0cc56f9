"""The training and evaluation sections."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section, Seed

DEFAULT_WARMUP = 0.03

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit",
    "adagrad",
    "adafactor",
    "sgd",
]

Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]

_SAME = "is another name of {}"
_PACKAGE = "needs the package {}, which is not among those that are pinned and tested here"
_LOW_RANK = "projects the gradients of whole weights to a low rank, which an adapter's have already"
LEFT_OUT = {
    "adamw_bnb_8bit": _SAME.format("adamw_8bit"),
    "rmsprop_bnb": _SAME.format("rmsprop_bnb_32bit"),
    "adamw_torch_xla": "is for TPUs",
    "adamw_torch_npu_fused": "is for NPUs",
    "adamw_anyprecision": _PACKAGE.format("torchdistx"),
    "adamw_torch_4bit": _PACKAGE.format("torchao"),
    "adamw_torch_8bit": _PACKAGE.format("torchao"),
    "grokadamw": _PACKAGE.format("grokadamw"),
    "stable_adamw": _PACKAGE.format("torch-optimi"),
    "schedule_free_adamw": _PACKAGE.format("schedulefree"),
    "schedule_free_radam": _PACKAGE.format("schedulefree"),
    "schedule_free_sgd": _PACKAGE.format("schedulefree"),
    "lomo": "steps within the backward, before the gradient can be clipped or accumulated",
    "adalomo": "steps within the backward, before the gradient can be clipped or accumulated",
    "galore_adamw": _LOW_RANK,
    "galore_adamw_8bit": _LOW_RANK,
    "galore_adafactor": _LOW_RANK,
    "galore_adamw_layerwise": _LOW_RANK,
    "galore_adamw_8bit_layerwise": _LOW_RANK,
    "galore_adafactor_layerwise": _LOW_RANK,
    "apollo_adamw": _LOW_RANK,
    "apollo_adamw_layerwise": _LOW_RANK,
    "reduce_lr_on_plateau": "follows the evaluations, so that trials under one scheduler would have other curves",
    "greedy": "follows the training loss, so that no trial could be gone on with from its configuration",
    "cosine_warmup_with_min_lr": "is cosine_with_min_lr but for the rate of its first step",
}
"""Optimizers and schedules of transformers 5.23 that are not offered, and why."""

LEFT_OUT_LOSSES = {"chunked_nll": f"{_SAME.format('nll')}, which trl computes in chunks as well"}
"""Losses of trl 1.16 that are not offered, and why."""


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
    schedule: Schedule = "cosine"
    """Learning rate over the steps, by its transformers name."""
    warmup: Annotated[float, Field(ge=0)] = DEFAULT_WARMUP
    """Share of the steps (below 1) or number of steps (1 and above, rounded down); schedule constant has none."""
    cycles: PositiveInt = 1
    """cosine_with_restarts: cosines one after another."""
    final_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the learning rate that is left at the end: polynomial, cosine_with_min_lr, warmup_stable_decay."""
    decay_steps: PositiveInt | None = None
    """warmup_stable_decay: the last steps, over which the rate falls."""
    optimizer: Optimizer = "adamw_torch_fused"
    """Optimizer by its transformers name. 8-bit ones keep tensors of fewer than 4,096 elements in 32 bits. The state
    of a paged one stays on the GPU in the fast engine."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the mean gradient that a step keeps (AdamW, AdEMAMix, Lion)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """The same of the mean square, in Lion of the momentum."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean square (AdamW, AdEMAMix)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the last step that the next one keeps (sgd, rmsprop)."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.3
    """Clip the gradient to this norm; 0 clips nothing."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay (decoupled in AdamW, AdEMAMix and Lion)."""
    loss: Literal["nll", "dft"] = "nll"
    """nll, or dynamic fine-tuning (arXiv 2508.05629): each token's loss times its probability; evaluations are nll."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread over the vocabulary; evaluations have none."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embedded tokens in training (NEFTune, arXiv 2310.05914), scaled by 1 / sqrt(tokens * width)."""
    engine: Literal["auto", "fast", "trl"] = "auto"
    """trl is its SFTTrainer as it is; fast is the same training, many times sooner; auto is fast where it can be."""
    recompute: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward: less memory, more work; auto where they do not fit (trl: never)."""
    dequantise: Literal["auto", "once", "per_layer"] = "auto"
    """fast: dequantise the base once and keep it, or at each use (less memory, slower); auto keeps it if it fits."""
    reproducible: bool = False
    """On a GPU, give a trial the same bits alone, beside any others and resumed, on the same GPU model and versions:
    its steps are made by themselves, which is slower. A CPU always does this."""
    group_by_length: bool = False
    """Batch rows of similar length: less padding in engine trl; the fast engine pads nothing and gains nothing."""
    eval_steps: PositiveInt = 50
    """Evaluate every so many steps, and after the last."""
    logging_steps: PositiveInt = 10
    """Record training figures every so many steps."""
    save_steps: PositiveInt | None = None
    """Save a checkpoint every so many steps; default at evaluations, one a minute (each where trials may pause)."""
    seed: Seed = 0
    """Seed of the adapter's start, the order of rows and dropout."""
    precision: Literal["auto", "bf16", "fp16", "none"] = "auto"
    """Autocast of the forward pass; auto is bf16 on a GPU that has it, none elsewhere."""
    tf32: bool = False
    """Round the factors of float32 products to 10 bits (Ampere GPUs and later)."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the adapter's weights (trl alone would use bfloat16 on a quantised base)."""

    @field_validator("optimizer", "schedule", "loss", mode="before")
    @classmethod
    def _is_offered(cls, name: Any) -> Any:
        left_out = LEFT_OUT | LEFT_OUT_LOSSES
        if isinstance(name, str) and name in left_out:
            raise ValueError(f"{name} {left_out[name]}")
        return name

    @property
    def is_adam(self) -> bool:
        """Whether the optimizer is an AdamW or an AdEMAMix."""
        return "adam" in self.optimizer or "adema" in self.optimizer

    @property
    def has_betas(self) -> bool:
        """Whether the optimizer takes beta1 and beta2."""
        return self.is_adam or "lion" in self.optimizer

    @model_validator(mode="after")
    def _has_what_is_set(self) -> Self:
        """A field that its optimizer or schedule has not would be without effect."""
        fields, schedule = type(self).model_fields, self.schedule
        has = {
            "beta1": self.has_betas,
            "beta2": self.has_betas,
            "epsilon": self.is_adam,
            "momentum": self.optimizer in ("sgd", "rmsprop"),
        }
        for name, is_there in has.items():
            if not is_there and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is set, but optimizer {self.optimizer} has none; leave it out")
        has = {
            "cycles": schedule == "cosine_with_restarts",
            "final_rate": schedule in ("polynomial", "cosine_with_min_lr", "warmup_stable_decay"),
            "decay_steps": schedule == "warmup_stable_decay",
        }
        for name, is_there in has.items():
            if not is_there and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is set, but schedule {schedule} has none; leave it out")
        if schedule == "warmup_stable_decay" and self.decay_steps is None:
            raise ValueError("schedule warmup_stable_decay needs decay_steps")
        if schedule == "cosine_with_min_lr" and self.final_rate == 0:
            raise ValueError("schedule cosine_with_min_lr needs a final_rate above 0; without, it is cosine")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs})")
        if self.steps is not None and (reason := self.does_not_fit(self.steps)):
            raise ValueError(reason)
        if self.schedule == "constant" and self.warmup not in (0, DEFAULT_WARMUP):
            raise ValueError(f"warmup is {self.warmup:g}, but schedule constant has none; use constant_with_warmup")
        if self.precision == "fp16" and self.adapter_dtype == "bfloat16":
            raise ValueError("precision fp16 scales gradients, which bfloat16 adapters cannot take; use float32")
        if self.loss == "dft" and self.label_smoothing:
            raise ValueError("label_smoothing is of loss nll alone: trl leaves it out of dft")
        if self.tf32 and self.precision != "none":
            raise ValueError(f"tf32 is of float32 products; set precision: none (it is {self.precision})")
        return self

    def steps_of(self, num_rows: int) -> int:
        """Optimizer steps of a trial with so many training rows, or sequences, as transformers counts them."""
        if self.steps is not None:
            return self.steps
        an_epoch = math.ceil(math.ceil(num_rows / self.batch_size) / self.accumulation)
        return math.ceil((self.epochs or 1.0) * an_epoch)

    def does_not_fit(self, steps: int) -> str | None:
        """Why the schedule is too long for a trial of so many optimizer steps, or None."""
        warmup = math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if self.warmup >= 1 and warmup >= steps:
            return f"warmup ({warmup} steps) must end before the last step ({steps})"
        if self.decay_steps is not None and warmup + self.decay_steps > steps:
            return f"warmup ({warmup} steps) and decay_steps ({self.decay_steps}) are more than the steps ({steps})"
        return None


class EvaluationSection(Section):
    """What is measured on the held-out rows beside the loss and the token accuracy."""

    metrics: list[Literal["exact_match"]] = []
    """Generation metrics, taken with the best adapter of COMPLETE trials (at every evaluation if searched for)."""
    rows: PositiveInt = 64
    """Held-out prompts that are answered."""
    max_new_tokens: PositiveInt = 64
    """Tokens an answer may have."""
