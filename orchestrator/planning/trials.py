"""The trials of a sweep as they may be drawn, how long they are, and at which steps they are compared."""

import random
from collections.abc import Iterator

from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections.scheduler import AshaScheduler, Brackets


def drawn_trials(spec: SweepSpec) -> list[TrialConfig]:
    """Return as many trials as the sweep has: those of a grid, or points drawn at random with the search's seed.

    A search by a model draws other points; their sizes are taken to be alike.
    """
    search = spec.search
    if not search.space:
        return [spec.trial_config({})]
    if search.algorithm == "grid":
        return [spec.trial_config(point) for point in search.points()]
    generator, points = random.Random(search.seed), list(search.first)
    while len(points) < search.total_trials:
        drawn = {path: axis.draw(generator) for path, axis in search.space.items()}
        points.append(search.decode(drawn))
    return [spec.trial_config(point) for point in points]


def rungs_of(spec: SweepSpec, steps: int) -> list[int]:
    """Return the steps at which a scheduler with rungs compares trials; [] if it has none or counts tokens.

    Args:
        spec: the experiment.
        steps: of the longest trial.
    """
    scheduler = spec.scheduler
    if not isinstance(scheduler, AshaScheduler | Brackets) or scheduler.counts != "step":
        return []
    return list(_powers(spec.grace_steps, scheduler.reduction_factor, steps))


def _powers(first: int, factor: int, below: int) -> Iterator[int]:
    while first < below:
        yield first
        first *= factor
