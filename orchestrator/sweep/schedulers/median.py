"""The median stopping rule (Golovin et al., Vizier, KDD 2017), with the reports of one moment judged together."""

from collections.abc import Iterable

import numpy as np

from orchestrator.spec.sections.scheduler import MedianScheduler
from orchestrator.sweep.schedulers.together import Heard, JudgedTogether


class Median(JudgedTogether):
    """Stops a trial whose best score is worse than the median of the other trials' mean scores up to the same time."""

    def _stops(self, names: list[str]) -> dict[str, str]:
        scheduler = self._spec.scheduler
        assert isinstance(scheduler, MedianScheduler)
        grace = scheduler.grace_tokens or self._spec.grace_steps
        return {
            name: f"{self._report(name)} and before is worse than the median of the other trials' means up to there"
            for name in names
            if self.heard[name][-1].time >= grace and is_below_median(self.heard, name, scheduler.min_trials)
        }


def is_below_median(heard: dict[str, list[Heard]], name: str, min_trials: int) -> bool:
    """Return whether a trial's best score is worse than the median of the others' means up to its last time.

    Args:
        heard: trial -> its evaluations. Others that have not reached the time do not count.
        name: the trial.
        min_trials: number of others that must have reached it; with fewer, no trial is below.
    """
    now = heard[name][-1].time
    means = [
        float(np.mean([each.score for each in curve if each.time <= now]))
        for other, curve in heard.items()
        if other != name and curve[-1].time >= now
    ]
    means = [mean for mean in means if np.isfinite(mean)]
    return len(means) >= min_trials and _best(heard[name]) > float(np.median(means))


def _best(curve: Iterable[Heard]) -> float:
    """Return the best score; NaN is worse than any number."""
    return min((each.score for each in curve if not np.isnan(each.score)), default=float("inf"))
