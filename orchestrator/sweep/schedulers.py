"""Early stopping in Ray Tune's terms, counted in optimizer steps (Tune by itself counts reports)."""

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.record import read_metrics
from orchestrator.spec import SweepSpec
from orchestrator.sweep.told import paths_of

# No trial is that long: rungs go on to each trial's own end, where it is complete, not stopped.
_NO_LAST_STEP = 2**31


def make_scheduler(spec: SweepSpec) -> TrialScheduler:
    """The experiment's scheduler. Metric and mode come from Tune's own configuration."""
    match spec.scheduler.kind:
        case "asha":
            asha = AsyncHyperBandScheduler(
                time_attr="step",
                grace_period=spec.grace_steps,
                reduction_factor=spec.scheduler.reduction_factor,
                max_t=_NO_LAST_STEP,
            )
            return RememberingScheduler(asha)
        case "median":
            median = MedianStoppingRule(
                time_attr="step",
                grace_period=spec.grace_steps,
                min_samples_required=spec.scheduler.min_trials,
                min_time_slice=_NO_LAST_STEP,  # by default it pauses trials for others, and each pause is a reload
            )
            return RememberingScheduler(median)
        case _:
            return FIFOScheduler()


class RememberingScheduler(TrialScheduler):  # type: ignore[misc]  # ray is untyped
    """A scheduler that knows after a resume what its trials reported before.

    Tune saves no scheduler with a sweep (ray 2.60, `TuneController.__getstate__`): rungs and medians would be empty
    after each resume. Here the evaluations of ended trials are read from disk again. Those of a trial that goes on are
    reported by itself, and counted once.
    """

    def __init__(self, inner: TrialScheduler) -> None:
        """`inner` decides."""
        super().__init__()
        self._inner = inner
        self._steps: dict[str, int] = {}

    @property
    def metric(self) -> Any:
        """The inner scheduler's."""
        return self._inner.metric

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """See Tune."""
        return bool(self._inner.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """See Tune. A trial that is added with an end is one of before the resume."""
        self._inner.on_trial_add(controller, trial)
        if not trial.is_finished():
            return
        for point in read_metrics(paths_of(trial)):
            if self.metric in point.values:
                self.on_trial_result(controller, trial, {**point.values, "step": point.step})

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See Tune. A step that was reported before is not counted again."""
        if result["step"] <= self._steps.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        self._steps[trial.trial_id] = result["step"]
        return str(self._inner.on_trial_result(controller, trial, result))

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See Tune."""
        self._inner.on_trial_complete(controller, trial, result)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """See Tune."""
        self._inner.on_trial_error(controller, trial)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """See Tune."""
        self._inner.on_trial_remove(controller, trial)

    def choose_trial_to_run(self, controller: Any) -> Any:
        """See Tune."""
        return self._inner.choose_trial_to_run(controller)

    def debug_string(self) -> str:
        """See Tune."""
        return str(self._inner.debug_string())
