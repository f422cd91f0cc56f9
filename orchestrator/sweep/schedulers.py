"""Early stopping in Ray Tune's terms, counted in optimizer steps (Tune by itself counts reports)."""

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.spec import SweepSpec

# No trial is that long: rungs go on to each trial's own end, where it is complete, not stopped.
_NO_LAST_STEP = 2**31


def make_scheduler(spec: SweepSpec) -> TrialScheduler:
    """The experiment's scheduler. Metric and mode come from Tune's own configuration."""
    match spec.scheduler.kind:
        case "asha":
            return AsyncHyperBandScheduler(
                time_attr="step",
                grace_period=spec.grace_steps,
                reduction_factor=spec.scheduler.reduction_factor,
                max_t=_NO_LAST_STEP,
            )
        case "median":
            return MedianStoppingRule(
                time_attr="step", grace_period=spec.grace_steps, min_samples_required=spec.scheduler.min_trials
            )
        case _:
            return FIFOScheduler()
