"""A trial as a tracker receives it: its identity, its points and its outcome."""

from orchestrator.record import BestPoint, MetricPoint, TrialPaths, TrialResult, TrialState
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.tracking.protocol import TrialIdentity


def identify(paths: TrialPaths, spec: SweepSpec, step: int = 0, config: TrialConfig | None = None) -> TrialIdentity:
    """Describe a trial that continues after a step."""
    start = TrialResult(
        trial_id=paths.trial_id,
        state=TrialState.RUNNING,
        config=config or spec.trial_config({}),
        metric=spec.search.metric,
        mode=spec.search.resolved_mode,
        step=step,
    )
    return TrialIdentity(paths, start, spec)


def point_at(step: int) -> MetricPoint:
    return MetricPoint(step=step, tokens=10 * step, time_s=step, values={"eval/loss": 1 / step})


def outcome(
    paths: TrialPaths, spec: SweepSpec, state: TrialState, step: int = 0, best_step: int | None = None
) -> TrialResult:
    """Make the result of a trial whose best evaluation, if it has one, is `point_at(best_step)`."""
    best = None
    if best_step is not None:
        values = point_at(best_step).values
        best = BestPoint(value=values["eval/loss"], step=best_step, values=values, adapter=f"adapters/step-{best_step}")
    return identify(paths, spec, step).start.model_copy(update={"state": state, "best": best})
