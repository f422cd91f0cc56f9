"""Make the Tune scheduler that an experiment asks for. Its time is optimizer steps or tokens, not reports."""

from typing import Any, assert_never

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import (
    AshaScheduler,
    BohbScheduler,
    Brackets,
    ForecastScheduler,
    HyperBandScheduler,
    MedianScheduler,
    NoScheduler,
    Pb2Scheduler,
    PbtScheduler,
    Population,
    Rungs,
)
from orchestrator.sweep.rng import IsolatedRng
from orchestrator.sweep.schedulers.asha import Asha
from orchestrator.sweep.schedulers.brackets import UNIT, Bohb, HyperBand
from orchestrator.sweep.schedulers.forecast_rule import ForecastRule
from orchestrator.sweep.schedulers.median import Median
from orchestrator.sweep.schedulers.population import NearestValues, Pbt, mutations


def make_scheduler(spec: SweepSpec, num_rows: int) -> TrialScheduler:
    """Return the Tune scheduler that decides. Tune passes metric and mode to it from its own configuration.

    Args:
        spec: the experiment.
        num_rows: training rows, or packed sequences.
    """
    scheduler = spec.scheduler
    match scheduler:
        case NoScheduler():
            return FIFOScheduler()
        case AshaScheduler():
            return Asha(spec, num_rows)
        case MedianScheduler():
            return Median(spec, num_rows)
        case ForecastScheduler():
            return ForecastRule(spec, num_rows)
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


def with_units(spec: SweepSpec, result: dict[str, Any]) -> dict[str, Any]:
    """Add the time in units to a report, in place: Tune's schedulers leave data for the searcher in it."""
    if (unit := time_unit(spec)) is not None:
        result[UNIT] = result[spec.scheduler.counts] / unit  # type: ignore[union-attr]
    return result
