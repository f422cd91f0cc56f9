"""What a sweep leaves on disk, as typed records."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from orchestrator.errors import FailureCause
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.words import counted


class Record(BaseModel):
    """Frozen, closed, and exact about infinities: NaN is written as "NaN", not as null."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TrialState(StrEnum):
    """Stopped (by the scheduler, or for the budget) is not failed; paused trials wait for others, and may go on."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


class MetricPoint(Record):
    """What was measured after one optimizer step."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Real (not padding) tokens trained on so far."""
    time_s: float
    """Seconds of this trial's work so far, restarts included."""
    values: dict[str, float]
    """Name -> value: `train/loss`, `train/grad_norm`, `train/learning_rate`, `eval/loss`, ..."""


class BestPoint(Record):
    """The best evaluation of a trial, and the adapter of that very step."""

    value: float
    """Value of the search metric."""
    step: int
    """Optimizer step of the evaluation."""
    values: dict[str, float]
    """All that was measured with this adapter."""
    adapter: str
    """PEFT adapter folder, relative to the trial's."""


class RowScores(Record):
    """What an adapter makes of each held-out row, in their order: by this, adapters are compared."""

    losses: list[float]
    """Sum over the row's tokens that have a loss."""
    hits: list[int]
    """Of these tokens, those that were the likeliest."""
    tokens: list[int]
    """How many these are."""
    answers: list[bool] = []
    """Of each held-out prompt that was answered, whether the answer was the wanted one."""

    @property
    def loss(self) -> float:
        """Mean over all tokens."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def token_accuracy(self) -> float:
        """Share of tokens that were the likeliest."""
        return sum(self.hits) / sum(self.tokens)

    def values(self) -> dict[str, float]:
        """As the trial's record names them."""
        values = {"eval/loss": self.loss, "eval/token_accuracy": self.token_accuracy}
        return values | ({"eval/exact_match": sum(self.answers) / len(self.answers)} if self.answers else {})


EARLIER_NAMES = {"alone": "not_packed_reason", "overshoot": "extra_steps"}
"""Fields of `TrialResult` as records of earlier versions name them -> their names today."""


class TrialResult(Record):
    """One trial so far (progress.json) or for good (result.json)."""

    trial_id: str
    state: TrialState
    config: TrialConfig
    metric: str
    mode: Literal["min", "max"]
    best: BestPoint | None = None
    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps planned; known once training has begun."""
    tokens: int = 0
    """Real tokens trained on."""
    tokens_per_second: float | None = None
    """Real tokens over seconds of training; evaluation and saving not counted."""
    grad_norm: float | None = None
    """Largest gradient norm seen before clipping."""
    peak_memory_gib: float | None = None
    """Most memory held: on a GPU what torch allocated, on a CPU the process's resident set."""
    seconds: float = 0.0
    """Wall-clock seconds of this trial's work, restarts included; loading the base not counted."""
    gpu_seconds: float = 0.0
    """GPU time: alone, `seconds` times the GPUs that its process holds; beside others, an equal share of the time of
    each step that it was in. 0 on a CPU."""
    engine: Literal["fast", "trl"] | None = None
    """What made the steps."""
    engine_reason: str | None = None
    """Why not the fast engine, where `auto` took the other."""
    not_packed_reason: str | None = None
    """Why it did not train beside others, in a sweep whose trials do."""
    memory_plan: dict[str, Any] | None = None
    """What the fast engine gave up for memory; on a GPU its peak, foreseen and measured with the largest batch."""
    device: str | None = None
    """Name of the GPU, or cpu."""
    worker: str | None = None
    """`host:pid` of the process that ran it last."""
    applied: dict[str, Any] = {}
    """What was read back from the live modules and optimizer after the first step."""
    checkpoint: str | None = None
    """Last complete checkpoint, relative to the trial's folder."""
    parent: str | None = None
    """Checkpoint of another trial that it went on from, as trial/checkpoints/checkpoint-step (PBT)."""
    adopted_tokens: int = 0
    """How much `tokens` rose (or fell) when it went on from another trial: these it has not trained on itself."""
    stopped: str | None = None
    """Why it was stopped: by which rule of the scheduler, or for the budget."""
    extra_steps: int = 0
    """Steps made past the evaluation at which the scheduler stopped the trial; not part of the record."""
    data_fingerprint: str | None = None
    """Hash of the tokens trained and evaluated on."""
    error: str | None = None
    """Why the trial failed."""
    failure: FailureCause | None = None
    """Kind of that failure: of the trial's own values, which searchers learn from, or of the machines around it."""
    warnings: list[str] = []
    """What went wrong without stopping the trial, such as a tracker that failed."""
    untracked: list[str] = []
    """Trackers that do not have all of this trial; they are given the rest when the sweep ends, or by `resume`."""

    @property
    def num_parameters(self) -> int | None:
        """Of its adapter; None for a trial that ended before this was read back."""
        return self.applied.get("num_trainable_parameters")

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {EARLIER_NAMES.get(name, name): value for name, value in values.items()}


class SourceRows(Record):
    """What one source gave."""

    source: str
    weight: float | None
    """Of the mix, where it has weights."""
    num_read: int
    """Rows that it has, or that were read of it."""
    num_taken: int
    """Rows of it that are used."""


class BadRows(Record):
    """Rows that the data section's format cannot read, all for one reason."""

    fault: str
    """What is wrong with each."""
    num_rows: int
    first: list[str]
    """Places of the first, as `file:line`."""

    def __str__(self) -> str:
        more = f" and {self.num_rows - len(self.first)} more" if self.num_rows > len(self.first) else ""
        return f"{self.fault}: {counted(self.num_rows, 'row')}: {', '.join(self.first)}{more}"


class ExperimentSource(Record):
    """The file that a sweep's experiment was read from."""

    file: str
    """Its absolute path."""
    overrides: list[str]
    """Values of `--set`, and `search.seed` of `--seed`."""
    folder: str
    """Working directory, from which relative paths in the overrides count."""


class SpecChange(Record):
    """A field of the experiment that `resume` has changed."""

    changed: str
    """UTC, ISO 8601."""
    field: str
    """Dotted name."""
    before: Any
    after: Any


class SweepInfo(Record):
    """What is known of a sweep before its first trial starts."""

    name: str
    created: str
    """UTC, ISO 8601."""
    spec: SweepSpec
    """As it is now, with `changes` applied."""
    source: ExperimentSource | None = None
    """None for an experiment that was not read from a file."""
    changes: list[SpecChange] = []
    """What was changed by `resume`, oldest first."""
    is_single_trial: bool
    """One trial of the experiment's own values, run without Ray."""
    data_fingerprint: str
    num_train: int
    """Training rows."""
    num_held_out: int
    """Held-out rows."""
    num_truncated: int
    """Rows that were cut to max_length."""
    num_dropped: int
    """Rows that had no token to learn from after the cut."""
    num_shared: int
    """Held-out rows that are training rows too, token for token."""
    num_sequences: int | None = None
    """Sequences that the training rows were packed into; None where each is one by itself."""
    sources: list[SourceRows] = []
    """Where the rows came from."""
    bad_rows: list[BadRows] = []
    """Rows that were left out because the format cannot read them (data.bad_rows: drop)."""
    versions: dict[str, str]
    """Package -> version on the driver."""
    git_commit: str | None
    """Commit of the working directory, `-dirty` where it had changes."""

    @property
    def num_trials(self) -> int:
        """Trials the sweep will have, unless its budget is spent before."""
        return 1 if self.is_single_trial else self.spec.search.total_trials
