"""Make the Tune scheduler that an experiment asks for. Its time is optimizer steps or tokens, not reports."""

import math
from typing import Any, assert_never

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import (
    AshaScheduler,
    BohbScheduler,
    Brackets,
    HyperBandScheduler,
    MedianScheduler,
    NoScheduler,
    Pb2Scheduler,
    PbtScheduler,
    Population,
    Rungs,
)
from orchestrator.sweep.rng import IsolatedRng
from orchestrator.sweep.schedulers.brackets import UNIT, Bohb, HyperBand
from orchestrator.sweep.schedulers.population import NearestValues, Pbt, mutations

_NO_LAST_STEP = 2**31
"""More steps than any trial has: rungs continue to each trial's own end, where it is complete, not stopped."""
_NO_LAST_TOKEN = 2**60


def make_scheduler(spec: SweepSpec) -> TrialScheduler:
    """Return the Tune scheduler that decides. Tune passes metric and mode to it from its own configuration."""
    scheduler = spec.scheduler
    match scheduler:
        case NoScheduler():
            return FIFOScheduler()
        case AshaScheduler():
            return AsyncHyperBandScheduler(
                time_attr=scheduler.counts,
                grace_period=_grace(spec, scheduler),
                reduction_factor=scheduler.reduction_factor,
                max_t=_NO_LAST_STEP if scheduler.counts == "step" else _NO_LAST_TOKEN,
                stop_last_trials=False,  # otherwise a later report is written into a skipped rung
            )
        case MedianScheduler():
            return MedianStoppingRule(
                time_attr=scheduler.counts,
                grace_period=_grace(spec, scheduler),
                min_samples_required=scheduler.min_trials,
                min_time_slice=math.inf,  # a smaller value pauses each trial for others at least once (ray 2.60)
            )
        case HyperBandScheduler():
            return HyperBand(**_bracket_settings(spec, scheduler))
        case BohbScheduler():
            return Bohb(**_bracket_settings(spec, scheduler))
        case PbtScheduler():
            return Pbt(
                IsolatedRng(spec.search.seed),
                **_population_settings(spec, scheduler),
                hyperparam_mutations=mutations(spec.search.space),
                custom_explore_fn=NearestValues(spec.search.space),
                resample_probability=scheduler.resample_probability,
                perturbation_factors=tuple(scheduler.factors),
            )
        case Pb2Scheduler():
            from orchestrator.sweep.schedulers.pb2 import Pb2

            return Pb2(IsolatedRng(spec.search.seed), spec.search.space, **_population_settings(spec, scheduler))
        case _:
            assert_never(scheduler)


def time_unit(spec: SweepSpec) -> int | None:
    """Return the steps or tokens of one unit of brackets; None for schedulers without brackets.

    Rungs are at powers of the reduction factor, in these units.
    """
    return _grace(spec, spec.scheduler) if isinstance(spec.scheduler, Brackets) else None


def _grace(spec: SweepSpec, scheduler: Rungs) -> int:
    return scheduler.grace_tokens or spec.grace_steps


def _bracket_settings(spec: SweepSpec, scheduler: Brackets) -> dict[str, Any]:
    longest = scheduler.max_tokens or scheduler.max_steps or spec.training.steps
    assert longest is not None
    return {
        "time_attr": UNIT,
        "max_t": longest // _grace(spec, scheduler),
        "reduction_factor": scheduler.reduction_factor,
        "stop_last_trials": False,  # a trial that passes the last rung runs to its own end, where it is complete
    }


def _population_settings(spec: SweepSpec, scheduler: Population) -> dict[str, Any]:
    return {
        "time_attr": scheduler.counts,
        "perturbation_interval": scheduler.interval_tokens or spec.interval_steps,
        "quantile_fraction": scheduler.quantile,
        "log_config": False,  # decisions.jsonl has it
    }
