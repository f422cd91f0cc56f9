"""The scheduler `forecast`: stops trials whose forecast loss has little chance to beat the leader's."""

import math
from typing import Any

import numpy as np

from orchestrator.spec import SweepSpec
from orchestrator.spec.search import LOSS
from orchestrator.spec.sections.scheduler import ForecastScheduler
from orchestrator.sweep.schedulers.forecast.law import Plan
from orchestrator.sweep.schedulers.forecast.plans import plan_trial
from orchestrator.sweep.schedulers.forecast.verdicts import (
    MIN_SEEN,
    Trial,
    default_chance,
    forecast_trials,
    outcomes,
    verdicts,
)
from orchestrator.sweep.schedulers.median import is_below_median
from orchestrator.sweep.schedulers.together import JudgedTogether

MIN_TRIALS = 3
"""Other trials that the median rule needs before it stops one."""


class ForecastRule(JudgedTogether):
    """Stops trials by `forecast.verdicts`, and by the median rule where it knows too little.

    All decisions follow from the evaluations heard so far and from the configurations of the trials. Both are in the
    records, so a sweep that is resumed decides as one that was not interrupted.
    """

    def __init__(self, spec: SweepSpec, num_rows: int) -> None:
        """
        Args:
            spec: the experiment.
            num_rows: training rows, or packed sequences.
        """
        super().__init__(spec, num_rows)
        self._plans: dict[str, Plan | str] = {}
        """Trial -> its plan, or why it has none. Most of the time of a decision would be spent on making them anew."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_plans"}

    def _stops(self, names: list[str]) -> dict[str, str]:
        scheduler = self._spec.scheduler
        assert isinstance(scheduler, ForecastScheduler)
        chance = scheduler.chance or default_chance(self._spec.search.total_trials)
        stops = {name: f"forecast: diverged, {why}" for name in names if (why := self._not_a_loss(name))}
        known = {name: self._trial(name) for name in self.heard if name not in stops and not self._not_a_loss(name)}
        field = [trial for trial in known.values() if isinstance(trial, Trial)]
        forecast = forecast_trials(field) if field else None
        found = verdicts(field, {name for name in names if name in known}, chance, forecast)
        stops |= {name: f"forecast: {why}" for name, why in found.items()}
        if stopped := self.forecasts.keys() | found.keys():
            expected = outcomes(field, forecast)
            self.forecasts = {name: expected[name] for name in self.heard if name in stopped}
        for name in names:
            unknown = known.get(name)
            if isinstance(unknown, str) and len(self.heard[name]) >= MIN_SEEN and self._is_below_median(name):
                report = self._report(name).removeprefix("forecast: ")
                stops[name] = (
                    f"forecast: by the median rule, because {unknown}: {report} and before is worse than the median of "
                    "the other trials' means up to there"
                )
        return stops

    def _is_below_median(self, name: str) -> bool:
        return is_below_median(self.heard, name, MIN_TRIALS)

    def _not_a_loss(self, name: str) -> str | None:
        """Return what is wrong with a trial's last loss, if it is not a positive number."""
        last = self.heard[name][-1]
        if self._spec.search.metric != LOSS or (math.isfinite(last.value) and last.value > 0):
            return None
        return f"loss {last.value:g} at step {last.step}"

    def _trial(self, name: str) -> Trial | str:
        """Return a trial for `verdicts`, or why it cannot be forecast."""
        if self._spec.search.metric != LOSS:
            return f"only {LOSS} can be forecast"
        if name not in self._plans:
            self._plans[name] = plan_trial(self._config(name), self._num_rows)
        plan = self._plans[name]
        if isinstance(plan, str):
            return plan
        losses = self._losses(name, plan)
        return losses if isinstance(losses, str) else Trial(name, plan, losses, name not in self.ended)

    def _losses(self, name: str, plan: Plan) -> "np.ndarray[tuple[int], np.dtype[np.float64]] | str":
        """Return a trial's losses at the planned evaluations."""
        curve = self.heard[name]
        if curve[-1].step == plan.steps[-1] and curve[-1].value >= min((e.value for e in curve[:-1]), default=math.inf):
            curve = curve[:-1]  # the last report holds the best loss, which is that of an earlier evaluation
        planned = {int(step) for step in plan.steps}
        used = [each for each in curve if each.step in planned]
        if not used or [each.step for each in used] != [int(step) for step in plan.steps[: len(used)]]:
            return "its evaluations are not those that its configuration plans"
        return np.array([each.value for each in used])
