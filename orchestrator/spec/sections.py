"""The sections of an experiment file: what a person writes, one sentence under each field."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""A sweep's name: one folder of its own."""

PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Strict (no silent conversion), frozen, and closed (unknown fields are refused)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class BaseSection(Section):
    """The base model and the form in which it is held while adapters train on it."""

    model: Annotated[str, Field(min_length=1)]
    """Hub id, folder, or `embedded` for the small base that ships with the package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit type of the frozen weights, or none."""
    double_quant: bool = True
    """Quantise the 4-bit scales as well (QLoRA, arXiv 2305.14314, section 3)."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of matrix products, and of the weights that are not quantised."""
    pad_token: Annotated[str, Field(min_length=1)] | None = None
    """Token that fills short rows (on the right); `eos` is the end token; default the tokenizer's own, else `eos`."""


class HeldOut(Section):
    """Rows kept for evaluation, the same for every trial. Exactly one of share, count, source."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the rows."""
    count: PositiveInt | None = None
    """Number of rows."""
    source: Annotated[str, Field(min_length=1)] | None = None
    """Own JSONL file or hub id."""
    config: str | None = None
    """Configuration of the hub data set in `source`."""
    split: str = "test"
    """Split of the hub data set in `source`."""
    max_rows: PositiveInt | None = None
    """Use only the first rows of `source`."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("share", "count", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of share, count, source, but got {given or 'none'}")
        if self.source is None and (self.config is not None or self.max_rows is not None or self.split != "test"):
            raise ValueError("config, split and max_rows belong to a source, and none is given")
        return self


class DataSection(Section):
    """Where rows come from and how they become tokens. Tokenised once, shared by all trials."""

    source: Annotated[str, Field(min_length=1)]
    """JSONL file, hub id, or `embedded` for the task of the embedded base."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    format: Literal["text", "prompt", "messages", "template"]
    """Columns: `text`; `prompt` and `completion`; `messages` (chat template); or any, through `template`."""
    template: str | None = None
    """Text with {column} fields; the completion starts at the last field."""
    loss_on: Literal["all", "completion"] = "all"
    """Which tokens are trained and evaluated on."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens a row; longer rows are cut on the right, and counted."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    held_out: HeldOut = HeldOut(share=0.1)
    """Rows for evaluation."""
    seed: int = 42
    """Seed of the split."""

    @staticmethod
    def is_local(source: str) -> bool:
        """Whether a source is a file or the embedded task, and not a hub id."""
        return source == "embedded" or source.startswith("/")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.format == "template" and not self.template:
            raise ValueError("format template needs a template, such as '<s>[INST] {question} [/INST] {answer} </s>'")
        if self.format != "template" and self.template:
            raise ValueError(f"a template is given, but format is {self.format}; set format: template")
        if self.held_out.source == self.source and (
            self.is_local(self.source) or (self.held_out.config, self.held_out.split) == (self.config, self.split)
        ):
            raise ValueError("held_out.source is the training source: the trials would be scored on what they learned")
        if self.is_local(self.source) and (self.config is not None or self.split != "train"):
            raise ValueError(f"config and split belong to a hub data set, but source is {self.source}")
        if self.format == "text" and self.loss_on == "completion":
            raise ValueError("loss_on: completion needs to know the prompt; format text has none")
        return self


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


class SchedulerSection(Section):
    """Which trials are stopped early. Time is counted in optimizer steps."""

    kind: Literal["none", "asha", "median"] = "none"
    """asha (arXiv 1810.05934), the median stopping rule (Vizier, KDD 2017), or none."""
    grace_steps: PositiveInt | None = None
    """No trial is stopped before this step, which is also asha's first rung; default eval_steps."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha: one in so many trials passes a rung; rungs lie at grace_steps times its powers."""
    min_trials: PositiveInt = 3
    """median: trials to compare with before any is stopped."""


class ResourcesSection(Section):
    """What trials take of the cluster. They train in workers: processes that hold the base, one a GPU."""

    gpus_per_trial: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs of a worker; auto is one where the cluster has any, else none. A trial may have several."""
    cpus_per_trial: PositiveInt = 1
    """CPU cores of a worker, and its threads where it has no GPU."""
    trials_per_gpu: PositiveInt | Literal["auto"] = "auto"
    """Trials that train together in a worker; auto is what memory allows where there are more trials than workers."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; default as many as fit."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of a trial whose worker died; each goes on from the last checkpoint."""

    @model_validator(mode="after")
    def _whole_gpus_are_not_shared(self) -> Self:
        if self.gpus_per_trial not in ("auto", 0, 1) and self.trials_per_gpu not in ("auto", 1):
            raise ValueError(
                f"trials_per_gpu={self.trials_per_gpu} shares one GPU, but gpus_per_trial={self.gpus_per_trial}"
            )
        return self


class WandbSection(Section):
    """Weights & Biases: group = sweep, one run a trial."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where WANDB_API_KEY is set, else offline."""
    project: str = "orchestrator"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""


class TrackingSection(Section):
    """Views of the records. The records themselves are always written."""

    tensorboard: bool = True
    """Write TensorBoard event files with hparams."""
    wandb: WandbSection = WandbSection()
    """Weights & Biases."""


class OutputSection(Section):
    """Where the sweep's folder goes."""

    folder: Annotated[str, Field(min_length=1)] = "runs"
    """Holds one folder a sweep; on a cluster, shared by all nodes. `--output` overrides it."""
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Folder of this sweep; default the file's name and the time. `--name` overrides it."""


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
