"""The records that a sweep leaves on disk, as pydantic models."""

from datetime import UTC, datetime
from enum import StrEnum
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import FailureCause
from orchestrator.record.names import InnerPath, Name
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections.evaluation import STDERR
from orchestrator.words import counted, say_gib


def time_now() -> str:
    """Return the time as records hold it: in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Record(BaseModel):
    """A record on disk: frozen and closed. NaN is written as "NaN", not as null, and infinities likewise."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings", defer_build=True)


class TrialState(StrEnum):
    """State of a trial. One stopped by the scheduler or the budget has not failed; a paused one may continue."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


class MetricPoint(Record):
    """Metrics measured after one optimizer step."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Real (not padding) tokens trained on so far."""
    time_s: float
    """Seconds of this trial's work so far, restarts included."""
    values: dict[str, float]
    """Name -> value: `train/loss`, `train/grad_norm`, `train/learning_rate`, `eval/loss`, ..."""


class BestPoint(Record):
    """The best evaluation of a trial, and the adapter of exactly that step."""

    value: float
    """Value of the search metric."""
    step: int
    """Optimizer step of the evaluation."""
    values: dict[str, float]
    """All metrics of this adapter."""
    adapter: InnerPath
    """PEFT adapter folder, relative to the trial's folder."""


class RowScores(Record):
    """An adapter's results on each held-out row, in the rows' order. Adapters are compared by them."""

    losses: list[float]
    """Sum of the losses of the row's tokens in the loss, in nats."""
    hits: list[int]
    """Number of these tokens that the model ranked first."""
    tokens: list[int]
    """Number of these tokens."""
    metrics: dict[str, list[float]] = {}
    """Metric of generated answers -> its value for each held-out prompt that was answered, such as exact_match: 1 for a
    right answer, else 0."""

    @property
    def loss(self) -> float:
        """Mean loss over all tokens, in nats."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def token_accuracy(self) -> float:
        """Share of tokens that the model ranked first."""
        return sum(self.hits) / sum(self.tokens)

    def values(self) -> dict[str, float]:
        """Return the metrics under the names that trial records use."""
        return {"eval/loss": self.loss, "eval/token_accuracy": self.token_accuracy} | metric_values(self.metrics)


def metric_values(metrics: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean and the standard error of metrics of generated answers, under the names that records use.

    The standard error of a mean over n rows is their standard deviation (with n - 1) over sqrt(n); one row has none.

    Args:
        metrics: name -> a number for each row.
    """
    values = {}
    for name, rows in metrics.items():
        values[f"eval/{name}"] = fmean(rows)
        if len(rows) > 1:
            values[f"eval/{name}{STDERR}"] = stdev(rows) / sqrt(len(rows))
    return values


class TrialResult(Record):
    """The state of one trial: so far (progress.json), or final (result.json)."""

    trial_id: Name
    state: TrialState
    config: TrialConfig
    metric: str
    mode: Literal["min", "max"]
    best: BestPoint | None = None
    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps planned; None until training has begun."""
    tokens: int = 0
    """Real tokens trained on."""
    tokens_per_second: float | None = None
    """Real tokens per second of training; evaluation and saving are not counted."""
    train_loss: float | None = None
    """Training loss of the last logged steps."""
    grad_norm: float | None = None
    """Largest gradient norm before clipping."""
    peak_memory_gib: float | None = None
    """Peak memory: on a GPU what torch allocated, on a CPU the resident set of the process."""
    seconds: float = 0.0
    """Wall-clock seconds of this trial's work, restarts included; loading the base is not counted."""
    gpu_seconds: float = 0.0
    """GPU time in seconds, 0 on a CPU. A trial that trains by itself counts `seconds` times the GPUs of its process.
    A trial that shares an engine counts an equal share of the time of each step that it took part in."""
    generated_tokens: int = 0
    """Tokens of all answers that were generated to measure `evaluation.metrics`."""
    generation_s: float = 0.0
    """Seconds that the trial has waited for these answers; trials that generate together wait for all of them."""
    engine: Literal["fast", "trl"] | None = None
    """Engine that trained the trial."""
    engine_reason: str | None = None
    """Why `auto` did not choose the fast engine."""
    not_packed_reason: str | None = None
    """Why the trial did not share an engine, in a sweep whose trials do."""
    memory_plan: dict[str, Any] | None = None
    """What the fast engine gave up to save memory; on a GPU also the peak, predicted and measured with the largest
    batch."""
    base_gib: float | None = None
    """Size of the loaded base's weights, with the scales of quantized ones, in GiB."""
    base_quantized_share: float | None = None
    """Share of the loaded base's weights that are quantized: in 4 bits under nf4 and fp4, in 8 under int8."""
    device: str | None = None
    """Name of the GPU, or cpu."""
    worker: str | None = None
    """`host:pid` of the process that ran the trial last."""
    started: str | None = None
    """Time at which the first attempt began, in UTC, ISO 8601; None before that."""
    ended: str | None = None
    """Time at which the trial ended for good, likewise."""
    applied: dict[str, Any] = {}
    """Settings read back from the live modules and optimizer after the first step."""
    checkpoint: InnerPath | None = None
    """Last complete checkpoint, relative to the trial's folder."""
    lacks_evaluation: bool = False
    """Whether the trial was interrupted while it evaluated at the step of its last checkpoint; that is done first when
    it continues."""
    parent: str | None = None
    """Checkpoint of another trial from which this one continued (PBT), as trial/checkpoints/checkpoint-step."""
    adopted_tokens: int = 0
    """Change of `tokens` when the trial continued from another one: it has not trained on these tokens itself."""
    stopped: str | None = None
    """Why the trial was stopped: a rule of the scheduler, the budget, or a request."""
    stopped_by: str | None = None
    """Who has asked for the stop, as user@host; None if nobody has. Such a stop says nothing about the values."""
    added_by: str | None = None
    """Who has asked for the trial (`add`, `clone`, `extend --steps`), as user@host; None if the search has made it."""
    cloned_from: str | None = None
    """Trial whose values a clone has, as TRIAL; or the adapter with which it began, as TRIAL/adapters/step-N."""
    extra_steps: int = 0
    """Steps made after the evaluation at which the scheduler stopped the trial; not part of the record."""
    data_fingerprint: str | None = None
    """Hash of the tokens trained and evaluated on."""
    error: str | None = None
    """Why the trial failed."""
    failure: FailureCause | None = None
    """Kind of the failure: caused by the trial's own values, from which searchers learn, or by the infrastructure."""
    warnings: list[str] = []
    """What went wrong without stopping the trial, such as a tracker that failed."""
    untracked: list[str] = []
    """Trackers that miss a part of this trial. They receive the rest when the sweep ends, or with `resume`."""

    @property
    def base_size(self) -> str | None:
        """Size of the base in words, such as `base: 97% of its weights in 4 bits, 17.3 GiB`; None if not measured."""
        if self.base_gib is None or self.base_quantized_share is None:
            return None
        bits = {"none": None, "int8": 8}.get(self.config.base.quantization, 4)
        share = f"{self.base_quantized_share:.0%} of its weights in {bits} bits, " if bits else ""
        return f"base: {share}{say_gib(self.base_gib)}"

    @property
    def num_parameters(self) -> int | None:
        """Trainable parameters of the adapter; None if the trial ended before they were read back."""
        return self.applied.get("num_trainable_parameters")


class ExploitCheckpoint(Record):
    """A copy of a trial's checkpoint from which other trials may continue (PBT), in Tune's folder of a checkpoint."""

    trial_id: Name
    """Trial whose checkpoint it is."""
    checkpoint: InnerPath
    """The checkpoint, relative to the trial's folder. The copy has the same name."""
    step: int
    """Its optimizer step."""


class SourceRows(Record):
    """What one source contributed."""

    source: str
    weight: float | None
    """Weight in the mix, if it has weights."""
    num_read: int
    """Rows that were read from the source."""
    num_taken: int
    """Rows of the source that are used."""


class BadRows(Record):
    """Rows that the data section's format cannot use, all for the same reason."""

    fault: str
    """What is wrong with each row."""
    num_rows: int
    first: list[str]
    """Places of the first rows, as `file:line`."""

    def __str__(self) -> str:
        more = f" and {self.num_rows - len(self.first)} more" if self.num_rows > len(self.first) else ""
        return f"{self.fault}: {counted(self.num_rows, 'row')}: {', '.join(self.first)}{more}"


class ExperimentSource(Record):
    """The file that a sweep's experiment was read from."""

    file: str
    """Absolute path of the file."""
    overrides: list[str]
    """Values of `--set`, and `search.seed` of `--seed`."""
    folder: str
    """Working directory, where relative paths in the overrides start."""


class AddedTrial(Record):
    """A trial that was added by a request, in its folder."""

    request: str
    """Name of the request."""
    by: str
    """Who has asked, as user@host."""
    values: dict[str, Any]
    """Dotted field -> value; all other fields are the experiment's own."""
    cloned_from: str | None = None
    """Where a clone comes from, as in `TrialResult.cloned_from`."""


class SpecChange(Record):
    """A change of one field of the experiment, made by `resume` or `extend`."""

    changed: str
    """Time in UTC, ISO 8601."""
    field: str
    """Dotted field."""
    before: Any
    after: Any
    request: str | None = None
    """Name of the request that has made it; None for a change by `resume`."""


class PriorTrial(Record):
    """A finished trial of an earlier sweep, as evidence for another."""

    trial_id: Name
    point: dict[str, Any]
    """Field that is searched now -> value of the trial."""
    value: float
    """Its best evaluation, on the earlier sweep's held-out rows."""


class PriorSweep(Record):
    """What a sweep has taken from an earlier one (`sweep --warm-from`). A resume does not need the earlier folder."""

    name: Name
    created: str
    """Time in UTC, ISO 8601."""
    base: str
    trials: list[PriorTrial]
    left_out: list[str] = []
    """Numbers of trials that were not taken, each with the reason."""


class SweepInfo(Record):
    """What is known of a sweep before its first trial starts."""

    name: Name
    created: str
    """Time in UTC, ISO 8601."""
    spec: SweepSpec
    """The experiment with all `changes` applied."""
    source: ExperimentSource | None = None
    """None for an experiment that was not read from a file."""
    changes: list[SpecChange] = []
    """Changes made by `resume` or `extend`, oldest first."""
    added: list[Name] = []
    """Trials that were added by requests, besides those of the search."""
    prior_sweeps: list[PriorSweep] = []
    """Earlier sweeps whose trials are evidence for the search; they are no trials of this sweep."""
    is_single_trial: bool
    """Whether this is one trial with the experiment's own values, run without Ray."""
    data_fingerprint: str
    num_train: int
    """Training rows."""
    num_held_out: int
    """Held-out rows."""
    num_test: int = 0
    """Test rows, on which only the winner is measured."""
    num_truncated: int
    """Rows that were cut to max_length."""
    num_dropped: int
    """Rows that were left out because no token in the loss remained after the cut."""
    num_shared: int
    """Held-out rows that are also training rows, token for token."""
    num_sequences: int | None = None
    """Sequences into which the training rows were packed; None without packing."""
    sources: list[SourceRows] = []
    """Sources of the training rows."""
    bad_rows: list[BadRows] = []
    """Rows that were left out because the format cannot use them (data.bad_rows: drop)."""
    versions: dict[str, str]
    """Package -> version on the driver."""
    git_commit: str | None
    """Commit of the working directory, with `-dirty` if it had changes."""

    @property
    def num_rows(self) -> int:
        """Training rows, or the sequences into which they were packed."""
        return self.num_sequences or self.num_train

    @property
    def num_trials(self) -> int:
        """Number of trials of the sweep, unless its budget is spent before."""
        return 1 if self.is_single_trial else self.spec.search.total_trials + len(self.added)
