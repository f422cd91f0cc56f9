"""The experiment's scheduler in Ray Tune's terms, in optimizer steps or tokens (Tune by itself counts reports)."""

import math
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import (
    AshaScheduler,
    BohbScheduler,
    Brackets,
    HyperBandScheduler,
    MedianScheduler,
    Pb2Scheduler,
    PbtScheduler,
    Population,
    Rungs,
)
from orchestrator.sweep.rng import OwnRng
from orchestrator.sweep.schedulers.brackets import UNIT, Bohb, HyperBand
from orchestrator.sweep.schedulers.population import Clone, Explored, Pbt, mutations

# No trial is that long: rungs go on to each trial's own end, where it is complete, not stopped.
_NO_LAST_STEP = 2**31


def make_scheduler(spec: SweepSpec) -> TrialScheduler:
    """Tune's scheduler, which decides. Metric and mode come from Tune's own configuration."""
    scheduler = spec.scheduler
    match scheduler:
        case AshaScheduler():
            return AsyncHyperBandScheduler(
                time_attr=scheduler.counts,
                grace_period=_grace(spec, scheduler),
                reduction_factor=scheduler.reduction_factor,
                max_t=_NO_LAST_STEP if scheduler.counts == "step" else 2**60,
                stop_last_trials=False,  # else a later report is written into a rung that was jumped over
            )
        case MedianScheduler():
            return MedianStoppingRule(
                time_attr=scheduler.counts,
                grace_period=_grace(spec, scheduler),
                min_samples_required=scheduler.min_trials,
                min_time_slice=math.inf,  # of less it pauses each trial for others at least once (ray 2.60)
            )
        case HyperBandScheduler():
            return HyperBand(**_bracket_settings(spec, scheduler))
        case BohbScheduler():
            return Bohb(**_bracket_settings(spec, scheduler))
        case PbtScheduler():
            return Pbt(
                **_population_settings(spec, scheduler),
                hyperparam_mutations=mutations(spec),
                custom_explore_fn=Explored(spec.search.space),
                resample_probability=scheduler.resample_probability,
                perturbation_factors=tuple(scheduler.factors),
            )
        case Pb2Scheduler():
            from orchestrator.sweep.schedulers.pb2 import Pb2

            return Pb2(spec.search.space, **_population_settings(spec, scheduler))
        case _:
            return FIFOScheduler()


def unit(spec: SweepSpec) -> int | None:
    """Steps or tokens of one unit of brackets, whose rungs lie at powers of the reduction factor; None without them."""
    return _grace(spec, spec.scheduler) if isinstance(spec.scheduler, Brackets) else None


def why_stopped(spec: SweepSpec, result: dict[str, Any]) -> str:
    """The rule by which a trial was stopped, with its last report."""
    scheduler, metric = spec.scheduler, spec.search.metric
    said = f"{scheduler.kind}: {metric} {result[metric]:.6g} at step {result['step']}"
    match scheduler:
        case AshaScheduler():
            return f"{said} is not among the best 1 in {scheduler.reduction_factor} that have come to its rung"
        case HyperBandScheduler() | BohbScheduler():
            return f"{said} is not among the best 1 in {scheduler.reduction_factor} of its bracket"
        case _:
            return f"{said} and before is worse than the median of the other trials' means up to there"


def why_cloned(spec: SweepSpec, result: dict[str, Any], clone: Clone) -> str:
    """The rule by which a trial takes over the state of another."""
    assert isinstance(spec.scheduler, Population)
    kind, share, metric = spec.scheduler.kind, spec.scheduler.quantile, spec.search.metric
    return (
        f"{kind}: {metric} {result[metric]:.6g} at step {result['step']} is among the worst {share:.0%} of the trials, "
        f"that of {clone.donor} among the best: from its step {clone.step} on with "
        + ", ".join(f"{path} {value:.6g}" for path, value in clone.values.items())
    )


def _grace(spec: SweepSpec, scheduler: Rungs) -> int:
    return scheduler.grace_tokens or spec.grace_steps


def _bracket_settings(spec: SweepSpec, scheduler: Brackets) -> dict[str, Any]:
    longest = scheduler.max_tokens or scheduler.max_steps or spec.training.steps
    assert longest is not None
    return {
        "time_attr": UNIT,
        "max_t": longest // _grace(spec, scheduler),
        "reduction_factor": scheduler.reduction_factor,
        "stop_last_trials": False,  # who passes the last rung runs to its own end, where it is complete
    }


def _population_settings(spec: SweepSpec, scheduler: Population) -> dict[str, Any]:
    return {
        "draws": OwnRng(spec.search.seed),
        "time_attr": scheduler.counts,
        "perturbation_interval": scheduler.interval_tokens or spec.interval_steps,
        "quantile_fraction": scheduler.quantile,
        "log_config": False,  # decisions.jsonl has it
    }
