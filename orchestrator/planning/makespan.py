"""The time of a sweep's trials on its GPUs: each worker steps the trials in its slots and takes the next ones."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.planning.gpus import Gpu
from orchestrator.planning.step_time import (
    TILE,
    PassWork,
    bucket_distance,
    bucket_tokens,
    evaluation_seconds,
    train_seconds,
)
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.sizes import EVALUATION_TOKENS
from orchestrator.training.fast.step.flat_batch import TokenizedRows

START_S, END_S = 24.0, 3.0
"""Seconds of a sweep before its base is loaded, with a cold kernel cache, and after its last step. Measured on a host
with 16 slow cores (docs/benchmarks.md, "Makespan of a sweep"): Ray 7, imports until 17, kernels until 22."""
SET_UP_S = 0.2
"""Seconds of setting up one of the first trials."""
LOADED_BYTES_PER_S = 2.2e9
"""Bytes of 16-bit weights that are read and quantized in a second: 1.1B in one second."""
HOST_S = 0.0005
"""Seconds of the host for a step of one trial: 8 ms for 16 trials at 1.1B (docs/log.md, 2026-11-23)."""
CAPTURE_LAYER_S = 0.011
"""Seconds of capturing the graph of a bucket, for each layer: 0.24 s with 22 layers."""
_DRAWS = 200
"""Batches that are drawn to count buckets."""


@dataclass(frozen=True)
class TrialSize:
    """What a trial asks of the GPU."""

    steps: float
    tokens: float
    """Mean tokens of a batch."""
    targets: float
    """Share of them that have a loss."""
    row_tokens: float
    """Mean length of the row of a token."""
    evaluations: int
    evaluated: int
    """Tokens of an evaluation."""
    rank: int
    batches: tuple[int, ...] = field(default=(), repr=False)
    """Tokens of batches that are drawn at random."""

    @classmethod
    def of(cls, config: TrialConfig, train: TokenizedRows, held_out: TokenizedRows) -> "TrialSize":
        """Measure a trial on the rows."""
        training, lengths = config.training, train.lengths
        steps, rows = training.steps_of(len(train)), min(training.batch_size * training.accumulation, len(train))
        generator = random.Random(0)
        drawn = tuple(int(lengths[generator.sample(range(len(train)), rows)].sum()) for _ in range(_DRAWS))
        return cls(
            steps,
            rows * float(lengths.mean()),
            float(train.num_targets_per_row.sum() / lengths.sum()),
            float((lengths.astype(float) ** 2).sum() / lengths.sum()),
            -(-steps // training.eval_steps),
            int(held_out.lengths.sum()),
            config.lora.rank,
            drawn,
        )


@dataclass(frozen=True)
class PackTimes:
    """Times of the trials that train together in one engine."""

    shape: BaseShape
    option: MemoryOption
    rank: int
    adapted: frozenset[str]
    is_separate: bool = False
    """Whether trials step one after another (`training.reproducible`)."""

    def step_seconds(self, gpu: Gpu, active: Sequence[TrialSize], num_slots: int | None = None) -> float:
        """Return the seconds in which each of these trials makes one step, without captures.

        Args:
            gpu: where they run.
            active: the trials.
            num_slots: slots of the engine, also free ones; default as many as trials.
        """
        if self.is_separate:
            return sum(replace(self, is_separate=False, rank=each.rank).step_seconds(gpu, [each]) for each in active)
        real = sum(each.tokens for each in active)
        # A batch that does not fit into a pass waits for the next one.
        num_passes = max(1.0, real / self.option.max_tokens)
        tokens = bucket_tokens(real / num_passes, max(1, round(len(active) / num_passes)))
        targets = sum(each.tokens * each.targets for each in active) / real
        work = PassWork(
            tokens,
            -(-int(4 * targets * tokens) // tokens) * tokens // 4,  # in quarters, as `Engine._bucket_of`
            sum(each.tokens * each.row_tokens for each in active) / real,
            num_slots or len(active),
            self.rank,
            self.adapted,
        )
        return max(num_passes * train_seconds(self.shape, gpu, self.option, work), HOST_S * len(active))

    def evaluation_seconds(self, gpu: Gpu, trial: TrialSize) -> float:
        """Return the seconds of one evaluation of a trial."""
        tokens = min(trial.evaluated, EVALUATION_TOKENS)
        work = PassWork(tokens, tokens, trial.row_tokens, 1, self.rank, self.adapted)
        return trial.evaluated / tokens * evaluation_seconds(self.shape, gpu, self.option, work)

    def capture_seconds(self, gpu: Gpu, active: Sequence[TrialSize], num_passes: float) -> float:
        """Return the seconds for which the GPU waits for captures of graphs.

        A bucket is captured at its first use, while the pass before it still runs.
        """
        generator, drawn = random.Random(0), min(int(num_passes), _DRAWS)
        sums = [sum(generator.choice(each.batches) for each in active) for _ in range(drawn)]
        filled = [total + len(active) * TILE // 2 for total in sums]
        num_buckets = len({-(-tokens // bucket_distance(tokens)) * bucket_distance(tokens) for tokens in filled})
        wait = self.shape.layers * CAPTURE_LAYER_S - self.step_seconds(gpu, active)
        return num_buckets * max(0.0, wait)


@dataclass
class _Worker:
    """A GPU with its clock and the steps that its trials have left."""

    seconds: float = 0.0
    left: list[tuple[TrialSize, float]] = field(default_factory=list)


def train_makespan(
    trials: Sequence[TrialSize], times: PackTimes, gpu: Gpu, num_gpus: int, slots: int
) -> tuple[float, float]:
    """Return the seconds of training and of evaluation until the last trial ends, the latter on one GPU's share.

    Each GPU takes the next trial as soon as a slot is free. Trials of a GPU step together, so that each makes a step in
    the time of all of them.

    Args:
        trials: in the order in which they start.
        times: of the engine on each GPU.
        gpu: kind of GPU.
        num_gpus: number of them.
        slots: trials at a time on each.
    """
    waiting, workers = deque(trials), [_Worker() for _ in range(num_gpus)]
    ended = [0.0] * num_gpus
    _fill(workers, waiting, slots)
    first = workers[0].left
    captured = times.capture_seconds(gpu, [trial for trial, _ in first], max((left for _, left in first), default=0))
    while any(worker.left for worker in workers):
        worker = min((each for each in workers if each.left), key=lambda each: each.seconds)
        active = [trial for trial, _ in worker.left]
        steps = min(left for _, left in worker.left)
        worker.seconds += steps * times.step_seconds(gpu, active, slots)
        worker.left = [(trial, left - steps) for trial, left in worker.left if left - steps > 1e-9]
        ended[workers.index(worker)] = worker.seconds
        _fill([worker], waiting, slots)
    evaluating = sum(each.evaluations * times.evaluation_seconds(gpu, each) for each in trials) / num_gpus
    return max(ended) + captured, evaluating


def _fill(workers: Sequence[_Worker], waiting: deque[TrialSize], slots: int) -> None:
    """Give waiting trials to free slots, one to each worker in turn."""
    while waiting and any(len(worker.left) < slots for worker in workers):
        for worker in sorted(workers, key=lambda each: len(each.left)):
            if waiting and len(worker.left) < slots:
                trial = waiting.popleft()
                worker.left.append((trial, trial.steps))


def start_seconds(base_bytes: float, slots: int) -> float:
    """Return the seconds from the command to the first step.

    Args:
        base_bytes: size of the base's files, in 16 bits.
        slots: trials that are set up before the first step.
    """
    return START_S + base_bytes / LOADED_BYTES_PER_S + SET_UP_S * slots


def shortened(trials: Sequence[TrialSize], shares: Sequence[float]) -> list[TrialSize]:
    """Return the trials with only a share of their steps and evaluations."""
    return [
        replace(trial, steps=trial.steps * share, evaluations=max(1, round(trial.evaluations * share)))
        for trial, share in zip(trials, shares, strict=True)
    ]


def total_tokens(trials: Sequence[TrialSize]) -> int:
    """Return the tokens that all trials train on."""
    return int(sum(trial.steps * trial.tokens for trial in trials))
