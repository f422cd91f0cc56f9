"""Refuse a scheduler that cannot have an effect.

A scheduler decides at evaluations, and a trial is complete at its last one, so one evaluation must come before it.
This is no rule of experiment files: a trial that is run by itself has no scheduler, and a record describes a sweep as
it was run.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.spec.axis_checks import config_at
from orchestrator.spec.sections.scheduler import (
    BohbScheduler,
    Brackets,
    ForecastScheduler,
    MedianScheduler,
    NoScheduler,
    Population,
    Rungs,
)
from orchestrator.spec.sweep_spec import SweepSpec

_LENGTH_FIELDS = (
    "training.steps",
    "training.epochs",
    "training.batch_size",
    "training.accumulation",
    "training.eval_steps",
)
"""Fields that change the length of a trial."""
_MAX_COMBINATIONS = 1024


@dataclass(frozen=True)
class _Reach:
    """The last evaluation of the longest trial before its end."""

    steps: int
    """Optimizer steps of the whole trial."""
    eval_step: int
    """Step of its last evaluation before the end."""
    time: int
    """The same in the scheduler's unit: steps, or tokens if every row has data.max_length of them."""


def require_scheduler_effect(spec: SweepSpec, num_rows: int | None = None) -> None:
    """Refuse a scheduler that would change nothing, whatever the trials report. A single trial may have any scheduler.

    `forecast` is never refused, because it is the default.

    Args:
        spec: the experiment.
        num_rows: training rows, or packed sequences; without it, steps are unknown if the experiment gives epochs.

    Raises:
        SpecError: the scheduler has no effect; the message says why, and what to write instead.
    """
    scheduler, total = spec.scheduler, spec.search.total_trials
    if isinstance(scheduler, NoScheduler | ForecastScheduler) or total == 1:
        return
    if isinstance(scheduler, MedianScheduler) and scheduler.min_trials >= total:
        raise SpecError(
            f"scheduler.min_trials: with {scheduler.min_trials} the median rule can stop no trial: each of {total} "
            f"trials has only {total - 1} others to compare with; give at most {total - 1}"
        )
    reach = _reach(spec, scheduler, num_rows)
    if reach is not None:
        _require_evaluation_in_time(spec, scheduler, reach)
    if isinstance(scheduler, Brackets):
        _require_trials(spec, scheduler, math.inf if reach is None else reach.time)


def _reach(spec: SweepSpec, scheduler: Rungs | Population, num_rows: int | None) -> _Reach | None:
    """Return the reach of the longest possible trial; None if it is unknown."""
    reaches = []
    for point in _lengths(spec, scheduler):
        try:
            config = config_at(spec.trials, spec.search.active(point))
        except ValueError as error:  # if there are very many combinations, the loader has tried only some
            raise SpecError(str(error)) from error
        training = config.training
        steps = training.steps if num_rows is None else training.steps_of(num_rows)
        if steps is None:
            return None
        eval_step = (steps - 1) // training.eval_steps * training.eval_steps
        tokens = training.batch_size * training.accumulation * config.data.max_length
        reaches.append(_Reach(steps, eval_step, eval_step * (tokens if scheduler.counts == "tokens" else 1)))
    return max(reaches, key=lambda reach: reach.time, default=None)


def _lengths(spec: SweepSpec, scheduler: Rungs | Population) -> list[dict[str, Any]]:
    """Return all combinations of points that differ in the length of a trial; none if there are too many to try.

    In steps, the longest trial lies at the ends of ranges. In tokens it may lie between them, because tokens are
    counted up to the last evaluation.
    """
    expressions = " ".join(spec.search.tied.values()) if set(spec.search.tied) & set(_LENGTH_FIELDS) else ""
    relevant = [path for path in spec.search.space if path in _LENGTH_FIELDS or path in expressions]
    relevant += [parent for path in relevant for parent in spec.search.ancestors(path)]
    values: dict[str, Sequence[Any]] = {path: axis.probes()[:1] for path, axis in spec.search.space.items()}
    for path in relevant:
        axis = spec.search.space[path]
        values[path] = (axis.all_values() or axis.probes()) if scheduler.counts == "tokens" else axis.probes()
    if math.prod(map(len, values.values())) > _MAX_COMBINATIONS:
        return []
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _require_evaluation_in_time(spec: SweepSpec, scheduler: Rungs | Population, reach: _Reach) -> None:
    kind, unit = scheduler.kind, _unit(scheduler)
    if reach.eval_step == 0:
        shorter = f"training.eval_steps below {reach.steps}" if reach.steps > 1 else "more training.steps"
        raise SpecError(
            f"scheduler.kind: {kind} would have no effect: with training.eval_steps {spec.training.eval_steps} no "
            f"trial is evaluated before its last step ({reach.steps}); give {shorter}, or scheduler.kind none"
        )
    name = "interval" if isinstance(scheduler, Population) else "grace"
    if (first := _first_time(spec, scheduler)) > reach.time:
        tokens = f", of at most {reach.time} tokens" if unit == "tokens" else ""
        raise SpecError(
            f"scheduler.{name}_{unit}: with {first}, {kind} would have no effect: the last evaluation before a trial's "
            f"end ({reach.steps} steps) is at step {reach.eval_step}{tokens}; give at most {reach.time}"
        )


def _require_trials(spec: SweepSpec, scheduler: Brackets, time: float) -> None:
    unit, grace, total = _unit(scheduler), _first_time(spec, scheduler), spec.search.total_trials
    longest = scheduler.max_tokens or scheduler.max_steps or spec.training.steps or 0
    brackets = _brackets(longest // grace, scheduler.reduction_factor)
    if isinstance(scheduler, BohbScheduler):
        brackets.reverse()
    least = _least_trials(brackets, scheduler.reduction_factor, time / grace)
    if least is None:
        raise SpecError(
            f"scheduler.max_{unit}: with {longest}, {scheduler.kind} would have no effect: its first rung is at "
            f"{min(rungs[0] for _, rungs in brackets if rungs) * grace} {unit}, and the last evaluation before a "
            f"trial's end is at {time:.0f}; give {grace * scheduler.reduction_factor}, which has a rung at {grace}"
        )
    if total < least:
        raise SpecError(_too_few_trials(spec, scheduler, least))


def _too_few_trials(spec: SweepSpec, scheduler: Brackets, least: int) -> str:
    total, is_bohb = spec.search.total_trials, isinstance(scheduler, BohbScheduler)
    field = "space" if spec.search.algorithm == "grid" else "num_trials"
    more = f"a grid of {least} or more" if field == "space" else f"{least} or more"
    order = "those with the most rungs first" if is_bohb else "those without a rung first"
    instead = "scheduler.kind asha" + (" with another search.algorithm" if is_bohb else "")
    return (
        f"search.{field}: with {total} trials, {scheduler.kind} would stop none: its brackets are filled one after "
        f"another, {order}; give {more}, or {instead}"
    )


def _unit(scheduler: Rungs | Population) -> str:
    """Return what the scheduler counts: steps or tokens."""
    return "steps" if scheduler.counts == "step" else "tokens"


def _first_time(spec: SweepSpec, scheduler: Rungs | Population) -> int:
    """Return when the scheduler first looks at a trial."""
    if isinstance(scheduler, Population):
        return scheduler.interval_tokens or spec.interval_steps
    return scheduler.grace_tokens or spec.grace_steps


def _brackets(units: int, factor: int) -> list[tuple[int, list[int]]]:
    """Return each full bracket's number of trials and its rungs in grace periods, as in Ray Tune's HyperBand."""
    most = round(math.log(units) / math.log(factor))
    return [
        (math.ceil((most + 1) / (halvings + 1) * factor**halvings), [first * factor**i for i in range(halvings)])
        for halvings in range(most + 1)
        if (first := units // factor**halvings)
    ]


def _least_trials(brackets: list[tuple[int, list[int]]], factor: int, last: float) -> int | None:
    """Return the smallest number of trials of which one must be stopped.

    Brackets are filled in the given order. Rungs after `last` (in grace periods) are never reached.
    """
    before = 0
    for size, rungs in brackets:
        kept = size
        for _ in [rung for rung in rungs if rung <= last]:
            kept = math.ceil(kept / factor)
        if kept < size:
            return before + kept + 1
        before += size
    return None
