"""How often the forecast's intervals held: its calibration, computed from curves after the fact."""

import numpy as np

from orchestrator.record import SweepRecord, TrialState, read_metrics
from orchestrator.spec.search import LOSS
from orchestrator.sweep.schedulers.forecast.plans import plan_trial
from orchestrator.sweep.schedulers.forecast.posterior import forecast
from orchestrator.sweep.schedulers.forecast.verdicts import MIN_SEEN, Trial, teaching_curves

_Z95 = 1.96


def intervals_held(trials: list[Trial], seen: int) -> list[bool]:
    """Return whether the 95% interval of each whole trial held its last loss, as of its evaluation number `seen`.

    Args:
        trials: trials with their whole curves; shorter curves, of trials that were stopped, teach the others only.
        seen: evaluations of each trial that the forecast may use.
    """
    curves = [np.log(trial.losses[:seen]) for trial in trials]
    found = forecast([trial.plan for trial in trials], curves, teaching_curves(trials, curves))
    sd = found.sd()
    return [
        bool(abs(np.log(trial.losses[-1]) - found.mean[i]) < _Z95 * sd[i])
        for i, trial in enumerate(trials)
        if len(trial.losses) == trial.plan.num_evaluations > seen
    ]


def coverage_of(record: SweepRecord) -> str | None:
    """Say how often the forecasts of a finished sweep held; None if no trial with a forecast ran to its end."""
    trials = []
    for result in record.trials():
        plan = plan_trial(result.config, record.info.num_rows)
        points = read_metrics(record.paths.trial(result.trial_id))
        losses = {point.step: point.values[LOSS] for point in points if LOSS in point.values}
        if result.state not in (TrialState.COMPLETE, TrialState.STOPPED) or isinstance(plan, str):
            continue
        curve = np.array([losses[int(step)] for step in plan.steps if int(step) in losses])
        if len(curve) and np.isfinite(curve).all() and (curve > 0).all():
            trials.append(Trial(result.trial_id, plan, curve))
    longest = max((trial.plan.num_evaluations for trial in trials), default=0)
    held = [each for seen in range(MIN_SEEN, longest) for each in intervals_held(trials, seen)]
    if not held:
        return None
    return (
        f"forecast: {sum(held)} of {len(held)} forecasts of trials that ran to their end held the loss in their 95% "
        "interval"
    )
