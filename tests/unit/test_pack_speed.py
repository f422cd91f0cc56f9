"""The speed of trials that train together, from the reports of each."""

import pytest

from benchmarks.common import Heard
from benchmarks.pack import WARM, speed
from orchestrator.training.attempt.events import Completed, Event, Logged

STEP_S, TOKENS, EVERY = 0.5, 800, 10


def test_speed_counts_all_tokens_of_trials_that_report_one_after_another() -> None:
    """Each of 8 trials makes 1,600 tokens a second, and reports a moment after the one before."""

    def reports(slot: int) -> list[tuple[float, Event]]:
        steps = range(EVERY, 2 * WARM + 1, EVERY)
        logged = [(step * STEP_S, Logged(step * STEP_S, 0.0, 3.0, step, step * TOKENS, 0.0, {})) for step in steps]
        return [(at + slot * 1e-3, event) for at, event in logged] + [(WARM + 1.0, Completed(WARM, 0.0, 3.0))]

    heard: Heard = [reports(slot) for slot in range(8)]
    figures = speed(heard)
    assert figures["tokens_per_second"] == pytest.approx(8 * TOKENS / STEP_S, rel=1e-3)
    assert figures["peak_gib"] == 3.0
