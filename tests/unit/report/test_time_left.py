"""The estimate of the time left, on sweeps recorded on a busy machine and on made-up ones."""

from statistics import fmean

import pytest

from orchestrator.record import TrialResult, TrialState
from orchestrator.report.time_left import TimeLeft
from orchestrator.spec.search import Budget
from tests.unit.report.made_up import made_up_spec
from tests.unit.report.replay import FOLDER, Estimate, replay

FILES = sorted(FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def estimates() -> dict[str, list[Estimate]]:
    return {file.stem: replay(file) for file in FILES}


def share_inside(found: list[Estimate]) -> float:
    return fmean(each.low <= each.truth <= each.high for each in found)


def test_the_range_contains_the_truth_of_recorded_sweeps_under_asha_and_the_forecast(
    estimates: dict[str, list[Estimate]],
) -> None:
    assert len(estimates) == 10
    shares = {name: share_inside(found) for name, found in estimates.items()}
    assert fmean(shares.values()) > 0.85, shares
    assert min(shares.values()) > 0.5, shares  # fc20: other work made the machine three times slower halfway


def test_the_range_shrinks(estimates: dict[str, list[Estimate]]) -> None:
    def width(begin: float, end: float) -> float:
        widths = [
            (each.high - each.low) / found[0].truth
            for found in estimates.values()
            for each in found
            if begin <= each.at < end
        ]
        return fmean(widths)

    assert width(0.2, 0.6) > width(0.6, 0.8) > width(0.8, 1.0)
    assert width(0.9, 1.0) < 0.6 * width(0.2, 0.5)


def test_an_estimate_begins_early(estimates: dict[str, list[Estimate]]) -> None:
    assert {name: found[0].at for name, found in estimates.items() if found[0].at > 0.5} == {}


def trial(index: int, step: int, total: int = 1000) -> TrialResult:
    state = TrialState.COMPLETE if step == total else TrialState.RUNNING
    return TrialResult(
        trial_id=str(index),
        state=state,
        config=made_up_spec().trial_config({}),
        metric="eval/loss",
        mode="min",
        step=step,
        total_steps=total,
    )


@pytest.mark.parametrize("num_trials", [2, 6])
def test_trials_that_will_take_free_slots_are_foreseen(num_trials: int) -> None:
    """Two slots make a step per second each; trials of 1000 steps come two by two."""
    now = 0.0
    time_left = TimeLeft(made_up_spec(), clock=lambda: now)
    for second in range(0, 500, 5):
        now = float(second)
        time_left.update([trial(0, second), trial(1, second)], num_trials)
    truth = num_trials / 2 * 1000 - now
    found = time_left.range()
    assert found is not None
    low, high = found
    assert 0.5 * truth < low < truth < high < 2 * truth


@pytest.mark.parametrize(
    ("limit", "truth"), [({"tokens": 50_000}, 2000.0), ({"wall_clock_hours": 0.5}, 1305.0), ({"gpu_hours": 1}, 3105.0)]
)
def test_a_budget_ends_a_sweep_that_would_take_longer(limit: dict[str, float], truth: float) -> None:
    """A trial makes a step, 20 tokens and a GPU second each second; there are fifty trials."""
    spec = made_up_spec()
    search = spec.search.model_copy(update={"budget": Budget.model_validate(limit)})
    now = 0.0
    time_left = TimeLeft(spec.model_copy(update={"search": search}), clock=lambda: now)
    for second in range(20, 501, 20):
        now = float(second)
        running = trial(0, second).model_copy(update={"tokens": 20 * second, "gpu_seconds": float(second)})
        time_left.update([running], 50)
    found = time_left.range()
    assert found is not None
    assert 0.7 * truth < found[0] < truth < found[1] < 1.3 * truth


def test_finalists_that_run_again_are_foreseen_and_a_step_back_breaks_nothing() -> None:
    spec = made_up_spec()
    search = spec.search.model_copy(update={"repeats": 3, "num_trials": 1})
    now = 0.0
    time_left = TimeLeft(spec.model_copy(update={"search": search}), clock=lambda: now)
    for second in range(5, 500, 5):
        now = float(second)
        time_left.update([trial(0, second)], 1)
    found = time_left.range()
    assert found is not None
    assert found[0] > 505 + 0.8 * 4 * 1000  # two finalists, each run twice more, on one slot
    again = [trial(0, 1000), *(trial(index, 5) for index in range(1, 9))]
    for _ in range(20):
        now += 5.0
        time_left.update(again, 9)
    found = time_left.range()
    assert found is not None
    assert 0 < found[0] <= found[1]


def test_nothing_is_estimated_before_the_pace_is_known() -> None:
    time_left = TimeLeft(made_up_spec(), clock=lambda: 0.0)
    for _ in range(5):
        time_left.update([trial(0, 0)], 2)
    assert time_left.range() is None


def test_the_range_counts_down_between_two_estimates() -> None:
    now = 0.0
    time_left = TimeLeft(made_up_spec(), clock=lambda: now)
    for second in range(0, 100, 5):
        now = float(second)
        time_left.update([trial(0, second)], 1)
    before = time_left.range()
    now += 10
    after = time_left.range()
    assert before is not None
    assert after == (before[0] - 10, before[1] - 10)
