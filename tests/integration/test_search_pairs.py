"""Each search algorithm under a scheduler that stops trials: the points and the stops follow from the records.

One trial at a time, so that their order is known. The rules are written out here, not asked of Ray Tune.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from searched import ONE_AT_A_TIME, TWO_AXES, by_age, decided, losses, replayed, sweep

from orchestrator.cluster import connection
from orchestrator.record import TrialState

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

Losses = dict[int, float]
STEPS, EVERY = 8, 2
ASHA = "{kind: asha, grace_steps: 2, reduction_factor: 2}"
MEDIAN = "{kind: median, grace_steps: 2, min_trials: 2}"
GRID = "search.space={training.learning_rate: {grid: [1e-3, 1e-5, 5e-3]}, training.weight_decay: {grid: [0.0, 0.1]}}"
SEARCHES = {
    "grid": ["search={algorithm: grid}", GRID],
    "auto": ["search={algorithm: auto, num_trials: 6}", TWO_AXES],
    "random": ["search={algorithm: random, num_trials: 6}", TWO_AXES],
    "tpe": ["search={algorithm: optuna, startup_trials: 2, num_trials: 6}", TWO_AXES],
    "cmaes": ["search={algorithm: optuna, sampler: cmaes, num_trials: 6}", TWO_AXES],
    "hyperopt": ["search={algorithm: hyperopt, startup_trials: 2, num_trials: 6}", TWO_AXES],
}


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """Start Ray once for all sweeps here."""
    with connection(None):
        yield


def asha_stops(before: list[Losses], own: Losses) -> int | None:
    """Return the rung at which a trial is worse than the better half of the trials that reached it before; or None."""
    for rung in (2, 4):
        others = [each[rung] for each in before if rung in each]
        if others and own.get(rung, 0) > np.percentile(others, 50):
            return rung
    return None


def median_stops(before: list[Losses], own: Losses) -> int | None:
    """Return the step at which a trial's best loss is worse than the median of the other trials' means; or None."""
    for step in range(EVERY, STEPS, EVERY):
        means = [np.mean([each[s] for s in each if s <= step]) for each in before if max(each) >= step]
        best = min((loss for s, loss in own.items() if s <= step), default=0)
        if len(means) >= 2 and best > np.median(means):
            return step
    return None


RULES: dict[str, tuple[str, Callable[[list[Losses], Losses], int | None], str]] = {
    "asha": (ASHA, asha_stops, "is not among the best 1 in 2 that have come to its rung"),
    "median": (MEDIAN, median_stops, "and before is worse than the median of the other trials' means up to there"),
}


@pytest.mark.parametrize(
    ("search", "rule"),
    [
        ("grid", "asha"),
        ("auto", "asha"),
        ("random", "median"),
        ("tpe", "asha"),
        ("cmaes", "median"),
        ("hyperopt", "asha"),
    ],
)
def test_points_and_stops_follow_from_the_records(tmp_path: Path, search: str, rule: str) -> None:
    scheduler, stops, reason = RULES[rule]
    record = sweep(
        tmp_path, *SEARCHES[search], "search.seed=5", f"scheduler={scheduler}", f"training.steps={STEPS}",
        *ONE_AT_A_TIME,
    )  # fmt: skip
    trials = by_age(record)
    assert len(trials) == 6
    recorded = [losses(record, trial) for trial in trials]
    expected = {}
    for i, trial in enumerate(trials):
        at = stops(recorded[:i], recorded[i])
        assert trial.step == max(recorded[i]) == (at or STEPS)
        assert trial.state == (TrialState.COMPLETE if at is None else TrialState.STOPPED)
        if at is not None:
            expected[trial.trial_id] = at
            assert trial.stopped == f"{rule}: eval/loss {recorded[i][at]:.6g} at step {at} {reason}"
    assert {each.trial_id: each.step for each in decided(record, "stopped")} == expected
    assert expected, "none was stopped"
    points = [trial.config.varied for trial in trials]
    if search == "grid":
        assert points == [*record.info.spec.search.points()]
    elif search != "random":
        # A complete trial reports its best loss to the searcher, a stopped one the loss at which it was stopped.
        reported = [
            own[max(own)] if trial.trial_id in expected else min(own.values())
            for trial, own in zip(trials, recorded, strict=True)
        ]
        assert replayed(record.info.spec, reported) == points
