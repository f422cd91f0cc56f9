"""Asynchronous successive halving (Li et al., arXiv 1810.05934), with the reports of one moment judged together."""

import numpy as np

from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import AshaScheduler
from orchestrator.sweep.schedulers.together import JudgedTogether


class Asha(JudgedTogether):
    """Stops a trial at a rung unless it is among the best 1 in `reduction_factor` of those that have come there.

    Each trial is compared with the others; the first one at a rung has none and passes. A trial that evaluates past
    several rungs at once is compared at the last of them.
    """

    def __init__(self, spec: SweepSpec, num_rows: int) -> None:
        """Take the arguments of `JudgedTogether`."""
        super().__init__(spec, num_rows)
        self.rungs: dict[int, dict[str, float]] = {}
        """Rung, in the unit of time -> trial -> its score there."""

    def _stops(self, names: list[str]) -> dict[str, str]:
        reached = {name: rung for name in names if (rung := self._enter(name)) is not None}
        return {name: self._why(name) for name, rung in reached.items() if self._is_behind(name, rung)}

    def on_trial_complete(self, tune_controller: object, trial: object, result: dict[str, object]) -> None:
        """Enter the rung that the end of a trial has reached."""
        has_ended = trial.trial_id in self.ended  # type: ignore[attr-defined]
        super().on_trial_complete(tune_controller, trial, result)
        if not has_ended:
            self._enter(trial.trial_id)  # type: ignore[attr-defined]

    def _enter(self, name: str) -> int | None:
        """Enter a trial's last score at the highest rung that it has reached; return the rung if it is new to it."""
        scheduler, last = self._section, self.heard[name][-1]
        rung = scheduler.grace_tokens or self._spec.grace_steps
        if last.time < rung:
            return None
        while rung * scheduler.reduction_factor <= last.time:
            rung *= scheduler.reduction_factor
        scores = self.rungs.setdefault(rung, {})
        if name in scores:
            return None
        scores[name] = last.score
        return rung

    def _is_behind(self, name: str, rung: int) -> bool:
        scores = self.rungs[rung]
        others = [score for other, score in scores.items() if other != name]
        return bool(others) and scores[name] > float(np.nanpercentile(others, 100 / self._section.reduction_factor))

    def _why(self, name: str) -> str:
        factor = self._section.reduction_factor
        return f"{self._report(name)} is not among the best 1 in {factor} that have come to its rung"

    @property
    def _section(self) -> AshaScheduler:
        assert isinstance(self._spec.scheduler, AshaScheduler)
        return self._spec.scheduler
