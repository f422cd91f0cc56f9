"""What a plan says, as pydantic models: `orchestrator plan --json` prints a `SweepPlan`."""

from typing import Any

from orchestrator.record.models import Record


class Measured(Record):
    """A few steps of a corner, measured on this machine."""

    device: str
    step_s: float
    """Seconds of a step of the trial alone."""
    tokens_per_second: float
    peak_gib: float | None
    """Memory that torch allocated on the GPU at its peak; None on a CPU."""
    engine: str


class CornerPlan(Record):
    """Trials of the same engine and size, at a corner of the search space, and what one of them needs alone."""

    values: dict[str, Any]
    """Searched and tied fields of one of these trials."""
    rank: int
    batch_rows: int
    """Rows of an optimizer step."""
    engine: str
    """fast or trl."""
    reason: str | None
    """Why the fast engine cannot hold it; None where it can, and where training.engine is trl."""
    fits: bool | None
    """Whether it fits into the GPU's memory; None where memory is not foreseen."""
    memory_gib: dict[str, float]
    """Part -> GiB at the peak (`MemoryPrediction`); empty where memory is not foreseen."""
    form: str | None
    """What is given up for memory, in words."""
    step_s: float | None
    """Seconds of an optimizer step of the trial alone."""
    measured: Measured | None = None

    @property
    def total_gib(self) -> float | None:
        """All parts together."""
        return sum(self.memory_gib.values()) if self.memory_gib else None

    @property
    def name(self) -> str:
        """The values in one line."""
        return ", ".join(f"{path} {value}" for path, value in self.values.items()) or "the experiment's own values"


class Duration(Record):
    """How long a sweep takes."""

    tokens: int
    """Tokens that all trials together train on."""
    start_s: float
    """From the command to the first step: imports, Ray, compiled kernels, the base, set-ups."""
    train_s: float
    evaluate_s: float
    """Measuring the held-out rows."""
    answer_s: float = 0.0
    """Generating answers for `evaluation.metrics`."""
    total_s: float
    gpu_hours: float
    """Hours that the workers hold their GPUs."""
    price: float | None
    """Price of the GPU hours; None without a price of one hour."""


class DiskPlan(Record):
    """Bytes that a sweep writes."""

    data: int
    adapters: int
    """The best adapter of each trial, which is kept."""
    checkpoints: int
    """Most that running trials have at a time; removed when a trial ends."""


class RowsPlan(Record):
    """The rows as the tokenizer encodes them."""

    num_train: int
    num_held_out: int
    num_sequences: int | None
    num_truncated: int
    num_dropped: int
    tokens_per_epoch: int
    median: int
    longest: int
    max_length: int
    lengths: list[tuple[int, int]]
    """Most tokens of a row -> number of rows that have more than the bin before."""


class SweepPlan(Record):
    """What is foreseen of a sweep."""

    name: str
    base: str
    device: str
    """GPU in words, or this machine's CPU."""
    num_gpus: int
    is_scaled: bool
    """Whether times are scaled from another GPU by the makers' data sheets."""
    num_trials: int
    algorithm: str
    scheduler: str
    steps: list[int]
    """Fewest and most optimizer steps of a trial."""
    tokens: int
    """Tokens that all trials together train on, if each runs to its end."""
    rungs: list[int]
    """Steps at which trials are compared; empty where the scheduler has no rungs, or counts tokens."""
    slots: int
    """Trials that train together on one GPU."""
    slots_why: str
    rows: RowsPlan
    corners: list[CornerPlan]
    """Corners that cannot fit come first, then the largest."""
    whole: Duration | None
    """If every trial runs to its end; None where the time is not foreseen."""
    stopped: list[Duration] | None
    """With the stopping rule, the shortest and the longest; None without a rule, or where its effect is not known."""
    time_unknown: str | None
    """Why there is no time."""
    disk: DiskPlan | None
    warnings: list[str]
    notes: list[str]

    num_dropped: int = 0
    """Points that `search.skip_unfit` would drop, of as many random points as the sweep has trials."""

    @property
    def unfit(self) -> list[CornerPlan]:
        """Corners that do not fit into the GPU's memory."""
        return [corner for corner in self.corners if corner.fits is False]
