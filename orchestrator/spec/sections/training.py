"""The training and evaluation sections."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from orchestrator.spec.sections.honored import ENGINES, FAST_ONLY, ORCHESTRATOR, TRL_ONLY, HonoredBy
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

FAST_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")
"""Optimizers that the fast engine has."""

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
_PACKAGE = "needs the package {}, which is not among the packages that are pinned and tested here"
_LOW_RANK = "projects the gradients of whole weights to a low rank, which an adapter's gradients already have"
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
    "lomo": "steps within the backward pass, before the gradient can be clipped or accumulated",
    "adalomo": "steps within the backward pass, before the gradient can be clipped or accumulated",
    "galore_adamw": _LOW_RANK,
    "galore_adamw_8bit": _LOW_RANK,
    "galore_adafactor": _LOW_RANK,
    "galore_adamw_layerwise": _LOW_RANK,
    "galore_adamw_8bit_layerwise": _LOW_RANK,
    "galore_adafactor_layerwise": _LOW_RANK,
    "apollo_adamw": _LOW_RANK,
    "apollo_adamw_layerwise": _LOW_RANK,
    "reduce_lr_on_plateau": "follows the evaluations, so trials under one scheduler would have different curves",
    "greedy": "follows the training loss, so no trial could be continued from its configuration",
    "cosine_warmup_with_min_lr": "is cosine_with_min_lr except for the rate of its first step",
}
"""Optimizers and schedules of transformers 5.23 that are not offered, and why."""

LEFT_OUT_LOSSES = {"chunked_nll": f"{_SAME.format('nll')}, which trl computes in chunks as well"}
"""Losses of trl 1.16 that are not offered, and why."""


class TrainingSection(Section):
    """Optimization of one trial. Steps are optimizer steps."""

    steps: Annotated[PositiveInt | None, ENGINES] = None
    """Optimizer steps. Give this or epochs."""
    epochs: Annotated[Annotated[float, Field(gt=0)] | None, ENGINES] = None
    """Passes over the training rows. Default: 1 if steps is not given."""
    batch_size: Annotated[PositiveInt, ENGINES] = 4
    """Rows in a forward pass."""
    accumulation: Annotated[PositiveInt, ENGINES] = 1
    """Forward passes in an optimizer step."""
    eval_batch_size: Annotated[PositiveInt, ENGINES] = 8
    """Rows in a forward pass in evaluation and generation."""
    learning_rate: Annotated[float, Field(gt=0), ENGINES] = 2e-4
    """Peak learning rate."""
    schedule: Annotated[Schedule, ENGINES] = "cosine"
    """Learning rate over the steps, by its name in transformers."""
    warmup: Annotated[float, Field(ge=0), ENGINES] = DEFAULT_WARMUP
    """Length of the warmup: a share of the steps if below 1, else a number of steps (rounded down). Schedule constant
    has none."""
    cycles: Annotated[PositiveInt, ENGINES] = 1
    """Number of cosines in schedule cosine_with_restarts."""
    final_rate: Annotated[float, Field(ge=0, lt=1), ENGINES] = 0.0
    """Share of the learning rate that is left at the end, in schedules polynomial, cosine_with_min_lr and
    warmup_stable_decay."""
    decay_steps: Annotated[PositiveInt | None, ENGINES] = None
    """Last steps of schedule warmup_stable_decay, over which the learning rate falls."""
    optimizer: Annotated[Optimizer, HonoredBy(fast=True, trl=True, fast_values=FAST_OPTIMIZERS)] = "adamw_torch_fused"
    """Optimizer, by its name in transformers. 8-bit optimizers keep tensors of fewer than 4,096 elements in 32 bits. In
    the fast engine, the state of a paged optimizer stays on the GPU."""
    beta1: Annotated[float, Field(ge=0, lt=1), ENGINES] = 0.9
    """Decay rate of the running mean of gradients (AdamW, AdEMAMix, Lion)."""
    beta2: Annotated[float, Field(ge=0, lt=1), ENGINES] = 0.999
    """Decay rate of the running mean of squared gradients (AdamW, AdEMAMix); in Lion, of the momentum."""
    epsilon: Annotated[float, Field(gt=0), ENGINES] = 1e-8
    """Added to the root of the mean squared gradient (AdamW, AdEMAMix)."""
    momentum: Annotated[float, Field(ge=0, lt=1), TRL_ONLY] = 0.0
    """Share of the last update that is added to the next one (sgd, rmsprop)."""
    max_grad_norm: Annotated[float, Field(ge=0), ENGINES] = 0.3
    """Clip the gradient to this norm. 0 disables clipping."""
    weight_decay: Annotated[float, Field(ge=0), ENGINES] = 0.0
    """Weight decay (decoupled in AdamW, AdEMAMix and Lion)."""
    loss: Annotated[Literal["nll", "dft"], TRL_ONLY] = "nll"
    """nll, or dft: dynamic fine-tuning (arXiv 2508.05629), each token's loss times its probability. Evaluations always
    use nll."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1), TRL_ONLY] = 0.0
    """Share of each target that is spread over the vocabulary. Evaluations use none."""
    neftune_alpha: Annotated[Annotated[float, Field(gt=0)] | None, TRL_ONLY] = None
    """Noise on the token embeddings in training, scaled by this / sqrt(tokens * width) (NEFTune, arXiv 2310.05914)."""
    engine: Annotated[Literal["auto", "fast", "trl"], ORCHESTRATOR] = "auto"
    """trl is TRL's SFTTrainer as it is. fast is the same training, many times faster. auto is fast if it supports the
    trial, else trl."""
    recompute: Annotated[Literal["auto"] | bool, ENGINES] = "auto"
    """Recompute activations in the backward pass: less memory, more work. auto: if they do not fit into memory (trl:
    never)."""
    dequantize: Annotated[Literal["auto", "once", "per_layer"], FAST_ONLY] = "auto"
    """In the fast engine, dequantize the base once and keep the result, or at each use (less memory, slower). auto:
    once, if it fits into memory."""
    reproducible: Annotated[bool, FAST_ONLY] = False
    """On a GPU, give a trial the same bits whether it trains alone, beside others or resumed, on the same GPU model and
    versions. Its steps are then made separately, which is slower. A CPU always does this."""
    group_by_length: Annotated[bool, HonoredBy(trl=True, fast_values=(False, True))] = False
    """Batch rows of similar length. This reduces padding in engine trl; the fast engine pads nothing."""
    eval_steps: Annotated[PositiveInt, ENGINES] = 50
    """Steps between two evaluations. There is always one after the last step."""
    logging_steps: Annotated[PositiveInt, ENGINES] = 10
    """Steps between two records of training metrics."""
    save_steps: Annotated[PositiveInt | None, ENGINES] = None
    """Steps between two checkpoints. Default: at evaluations, at most one a minute (at each evaluation if the scheduler
    may pause or clone trials)."""
    seed: Annotated[Seed, ENGINES] = 0
    """Seed of the adapter's initial weights, the order of rows, and dropout."""
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "none"], HonoredBy(fast=True, trl=True, fast_values=("auto", "bf16", "none"))
    ] = "auto"
    """Autocast of the forward pass. auto is bf16 on a GPU that supports it, else none."""
    tf32: Annotated[bool, TRL_ONLY] = False
    """Round the factors of float32 products to 10 bits (Ampere GPUs and later)."""
    adapter_dtype: Annotated[Literal["float32", "bfloat16"], ENGINES] = "float32"
    """Type of the adapter's weights. (TRL's own default is bfloat16 on a quantized base.)"""

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
        """Refuse a field that the optimizer or schedule does not have: it would have no effect."""
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
            raise ValueError("schedule cosine_with_min_lr needs a final_rate above 0; with 0 it is cosine")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs})")
        if self.steps is not None and (reason := self.schedule_overflow_reason(self.steps)):
            raise ValueError(reason)
        if self.schedule == "constant" and self.warmup not in (0, DEFAULT_WARMUP):
            raise ValueError(f"warmup is {self.warmup:g}, but schedule constant has none; use constant_with_warmup")
        if self.precision == "fp16" and self.adapter_dtype == "bfloat16":
            raise ValueError("precision fp16 scales gradients, which bfloat16 adapters do not support; use float32")
        if self.loss == "dft" and self.label_smoothing:
            raise ValueError("label_smoothing applies only to loss nll: trl ignores it with dft; leave it out")
        if self.tf32 and self.precision != "none":
            raise ValueError(f"tf32 applies to float32 products; set precision: none (it is {self.precision})")
        return self

    def steps_of(self, num_rows: int) -> int:
        """Return the optimizer steps of a trial with this many rows or sequences, as transformers counts them."""
        if self.steps is not None:
            return self.steps
        an_epoch = math.ceil(math.ceil(num_rows / self.batch_size) / self.accumulation)
        return math.ceil((self.epochs or 1.0) * an_epoch)

    def schedule_overflow_reason(self, steps: int) -> str | None:
        """Return why the schedule is too long for a trial of this many optimizer steps, or None."""
        warmup = math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if self.warmup >= 1 and warmup >= steps:
            return f"warmup ({warmup} steps) must end before the last step ({steps})"
        if self.decay_steps is not None and warmup + self.decay_steps > steps:
            return f"warmup ({warmup} steps) and decay_steps ({self.decay_steps}) exceed the steps ({steps})"
        return None
