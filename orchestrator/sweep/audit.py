"""Audit a sweep: run a random sample of its stopped trials to their end, and count those that would have won."""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.deploy.recommend import CONFIDENCE
from orchestrator.errors import RequestError
from orchestrator.record import SweepPaths, SweepRecord, TrialResult, TrialState, have_ended, read_metrics
from orchestrator.spec.sections.scheduler import Population
from orchestrator.sweep.reruns import begin_rerun, point_of, rerun_spec

DEFAULT_TRIALS = 8
"""Stopped trials that run to their end, if there are as many."""


@dataclass(frozen=True)
class AuditedTrial:
    """A stopped trial of the sweep, and how it would have gone on."""

    trial_id: str
    """Trial of the sweep."""
    stopped_at: int
    """Optimizer step at which it was stopped."""
    stopped_value: float | None
    """Its best value until then; None if it had none."""
    audit_id: str
    """Trial of the audit that ran the same values to their end."""
    value: float | None
    """Best value of the whole trial; None if it failed by its own values."""
    gain: float | None
    """Distance by which that is better than the sweep's best value; negative if it is worse."""
    difference: float
    """Largest difference between the two trials' values until the stop."""

    @property
    def would_have_won(self) -> bool:
        """Whether the whole trial is better than the best one of the sweep."""
        return self.gain is not None and self.gain > 0


@dataclass(frozen=True)
class Saving:
    """What the stopped trials of a sweep did not spend, as if the rest of each had cost as much a step as its start."""

    tokens: int
    share_of_tokens: float
    """Share of the tokens that all trials of the sweep would have trained on."""
    gpu_seconds: float
    """0 where trials ran on a CPU."""
    seconds: float
    """Wall-clock time of the trials' work, added up over trials."""


@dataclass(frozen=True)
class Audit:
    """What an audit has found."""

    sweep: str
    scheduler: str
    metric: str
    leader: str
    """Best trial of the sweep."""
    best: float
    num_stopped: int
    """Trials that the scheduler has stopped."""
    seed: int
    """Seed of the sample."""
    trials: list[AuditedTrial]
    """The sample; trials that machines have lost are left out."""
    saving: Saving

    @property
    def num_won(self) -> int:
        """Number of trials of the sample that would have won."""
        return sum(trial.would_have_won for trial in self.trials)

    @property
    def interval(self) -> tuple[int, int]:
        """Bounds of the number of all stopped trials that would have won."""
        return num_bounds(self.num_won, len(self.trials), self.num_stopped)

    @property
    def regret(self) -> float:
        """Largest gain that was missed in the sample, in the metric's unit; 0 if no trial would have won."""
        return max((trial.gain for trial in self.trials if trial.gain is not None and trial.gain > 0), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Return the audit as plain JSON values."""
        document = asdict(self)
        for trial, shown in zip(self.trials, document["trials"], strict=True):
            shown["would_have_won"] = trial.would_have_won
        return document | {
            "choice": "random",
            "num_audited": len(self.trials),
            "num_won": self.num_won,
            "interval": list(self.interval),
            "confidence": CONFIDENCE,
            "regret": self.regret,
        }


def stopped_trials(record: SweepRecord) -> list[TrialResult]:
    """Return the trials that the sweep's scheduler has stopped, in the order of their names.

    Those that were stopped because a budget was spent are left out.
    """
    rule = f"{record.info.spec.scheduler.kind}: "
    found = [
        trial
        for trial in record.trials()
        if trial.state == TrialState.STOPPED and (trial.stopped or "").startswith(rule) and trial.step
    ]
    return sorted(found, key=lambda trial: trial.trial_id)


def begin_audit(record: SweepRecord, number: int | None, seed: int) -> SweepRecord:
    """Return the record of an audit, made now or by an earlier driver. The sweep's own records stay as they are.

    Args:
        record: a sweep that has ended.
        number: stopped trials that run to their end; None for `DEFAULT_TRIALS`, or all if there are fewer.
        seed: seed of the sample.

    Raises:
        RequestError: the sweep has not ended, or there are not as many stopped trials.
    """
    root = record.paths.root
    if not have_ended(record.info, record.trials(), record.why_over()):
        raise RequestError(
            f"{root}: the sweep has not ended, and its best trial may change",
            f"Continue it with: orchestrator resume {root}",
        )
    scheduler = record.info.spec.scheduler
    stopped = [] if isinstance(scheduler, Population) else stopped_trials(record)
    if not stopped:
        raise RequestError(
            f"{root}: scheduler {scheduler.kind} has stopped no trial, so that there is nothing to audit",
            f"`orchestrator status {root}` shows the state of each trial.",
        )
    if number is not None and number > len(stopped):
        raise RequestError(f"--trials {number}: the scheduler has stopped {len(stopped)}; give at most that number")
    number = number or min(DEFAULT_TRIALS, len(stopped))
    spec = record.info.spec
    sample = random.Random(seed).sample(stopped, number)
    points = list({repr(point): point for point in (point_of(trial, spec) for trial in sample)}.values())
    return begin_rerun(record, audit_paths(record, number, seed).root, rerun_spec(spec, points))


def audit_paths(record: SweepRecord, number: int, seed: int) -> SweepPaths:
    """Return where an audit of so many trials is."""
    return SweepPaths(record.paths.audits / f"{number}-trials-seed-{seed}")


def find(record: SweepRecord, audit: SweepRecord, seed: int) -> Audit:
    """Compare the trials of an audit with the best one of the sweep.

    Args:
        record: the sweep.
        audit: the record of `begin_audit`, whose trials have ended.
        seed: seed of the sample.
    """
    spec, stopped = record.info.spec, stopped_trials(record)
    leader = record.finished()[0]
    assert leader.best is not None
    by_point = {repr(point_of(trial, spec)): trial for trial in reversed(stopped)}
    audited = [
        _compare(record, audit, by_point[repr(point_of(again, spec))], again, leader.best.value)
        for again in audit.trials()
        if again.state in (TrialState.COMPLETE, TrialState.FAILED) and again.failure != "infrastructure"
    ]
    return Audit(
        sweep=record.paths.name,
        scheduler=spec.scheduler.kind,
        metric=spec.search.metric,
        leader=leader.trial_id,
        best=leader.best.value,
        num_stopped=len(stopped),
        seed=seed,
        trials=audited,
        saving=_saving(record.trials(), stopped),
    )


def _compare(
    record: SweepRecord, audit: SweepRecord, stopped: TrialResult, again: TrialResult, best: float
) -> AuditedTrial:
    sign = 1 if again.mode == "min" else -1
    value = None if again.best is None or again.failure is not None else again.best.value
    before, after = _values(record, stopped), _values(audit, again)
    shared = [step for step in before if step in after and math.isfinite(before[step] - after[step])]
    return AuditedTrial(
        trial_id=stopped.trial_id,
        stopped_at=stopped.step,
        stopped_value=stopped.best.value if stopped.best else None,
        audit_id=again.trial_id,
        value=value,
        gain=None if value is None else sign * (best - value),
        difference=max((abs(before[step] - after[step]) for step in shared), default=0.0),
    )


def _values(record: SweepRecord, trial: TrialResult) -> dict[int, float]:
    points = read_metrics(record.paths.trial(trial.trial_id))
    return {point.step: point.values[trial.metric] for point in points if trial.metric in point.values}


def _saving(trials: list[TrialResult], stopped: list[TrialResult]) -> Saving:
    left = {
        trial.trial_id: max(0, (trial.total_steps or trial.step) - trial.step - trial.extra_steps) / trial.step
        for trial in stopped
    }
    tokens = sum(left[trial.trial_id] * trial.tokens for trial in stopped)
    spent = sum(trial.tokens + trial.extra_steps * trial.tokens / max(1, trial.step) for trial in trials)
    return Saving(
        tokens=round(tokens),
        share_of_tokens=tokens / (tokens + spent) if tokens + spent else 0.0,
        gpu_seconds=sum(left[trial.trial_id] * trial.gpu_seconds for trial in stopped),
        seconds=sum(left[trial.trial_id] * trial.seconds for trial in stopped),
    )


def num_bounds(num_won: int, num_sampled: int, population: int) -> tuple[int, int]:
    """Return bounds of how many of a population would have won, given a random sample of it without replacement.

    They hold with probability `CONFIDENCE` or more: all numbers that neither one-sided hypergeometric test refuses
    (Clopper and Pearson 1934, for finite populations Buonaccorsi, The American Statistician 41(3), 1987).
    """
    level = (1 - CONFIDENCE) / 2

    def chance(winners: int, numbers: range) -> float:
        ways = sum(math.comb(winners, each) * math.comb(population - winners, num_sampled - each) for each in numbers)
        return ways / math.comb(population, num_sampled)

    possible = [
        winners
        for winners in range(num_won, population - (num_sampled - num_won) + 1)
        if chance(winners, range(num_won, num_sampled + 1)) > level and chance(winners, range(num_won + 1)) > level
    ]
    return possible[0], possible[-1]
