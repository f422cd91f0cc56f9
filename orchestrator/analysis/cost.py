"""What a sweep has cost, from the records of its trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.analysis.sweep_data import SweepData
from orchestrator.record import OPEN, TrialResult, TrialState


@dataclass(frozen=True)
class Cost:
    """Totals over all trials, the repeats of the finalists included."""

    tokens: int
    """Real tokens trained on."""
    trial_seconds: float
    """Seconds of all trials together; trials that ran side by side count each."""
    gpu_hours: float
    """GPU hours held by trials; 0 without GPUs."""
    wall_seconds: float | None
    """Seconds from the start of the first trial to the end of the last; None if the records have no times."""
    steps: int
    """Steps made, a trial's donor's not counted (PBT)."""
    planned_steps: int
    """Steps that all trials would have made without a stop or a failure; trials that can go on count with theirs.
    Repeats of the finalists count neither here nor in `steps`."""
    tokens_saved: int
    """Estimated tokens of the steps that stopped trials skipped, at each trial's own tokens per step."""
    seconds_saved: float
    """Estimated seconds of these steps, at each trial's own speed."""
    failed_share: float
    """Share of the trial seconds that went into failed trials."""
    winner_share: float | None
    """Share of the trial seconds that went into the leader's run, without its repeats."""
    devices: list[str]

    @property
    def steps_saved(self) -> float:
        """Share of the planned steps that were skipped."""
        return 1 - self.steps / self.planned_steps if self.planned_steps else 0.0


def find_cost(data: SweepData) -> Cost:
    """Return what the sweep has cost so far."""
    trials = [*data.trials, *data.repeats]
    seconds = sum(trial.seconds for trial in trials)
    failed = sum(trial.seconds for trial in trials if trial.state == TrialState.FAILED)
    known = [trial.total_steps for trial in data.trials if trial.total_steps]
    usual = max(known, default=0)
    leader = data.leader
    saved = [_saved(trial) for trial in data.trials if trial.state == TrialState.STOPPED]
    return Cost(
        tokens=sum(trial.tokens - trial.adopted_tokens for trial in trials),
        trial_seconds=seconds,
        gpu_hours=sum(trial.gpu_seconds for trial in trials) / 3600,
        wall_seconds=_wall_seconds(trials),
        steps=sum(trial.step - _adopted_steps(trial) for trial in data.trials),
        planned_steps=sum(
            (trial.step if trial.state in OPEN else trial.total_steps or usual) - _adopted_steps(trial)
            for trial in data.trials
        ),
        tokens_saved=round(sum(tokens for tokens, _ in saved)),
        seconds_saved=sum(seconds for _, seconds in saved),
        failed_share=failed / seconds if seconds else 0.0,
        winner_share=leader.seconds / seconds if leader and seconds else None,
        devices=sorted({trial.device for trial in trials if trial.device}),
    )


def _adopted_steps(trial: TrialResult) -> int:
    """Return the net steps that a trial has taken over from others, by its tokens per step (PBT); rounded."""
    return round(trial.step * trial.adopted_tokens / trial.tokens) if trial.tokens else 0


def _saved(trial: TrialResult) -> tuple[float, float]:
    """Return the estimated tokens and seconds of the steps that a stopped trial skipped."""
    own = trial.tokens - trial.adopted_tokens
    if not (trial.total_steps and trial.step and own):
        return 0.0, 0.0
    tokens = max(trial.total_steps - trial.step, 0) * trial.tokens / trial.step
    return tokens, tokens * trial.seconds / own


def _wall_seconds(trials: Sequence[TrialResult]) -> float | None:
    starts = [datetime.fromisoformat(trial.started) for trial in trials if trial.started]
    ends = [datetime.fromisoformat(trial.ended) for trial in trials if trial.ended]
    if len(starts) < len(trials) or not ends:
        return None
    return max((max(ends) - min(starts)).total_seconds(), 0.0)
