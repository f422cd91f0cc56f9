"""Finalists with several seeds: their margin holds the noise of rows and that of seeds."""

import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from orchestrator.deploy.finished import ChosenTrial
from orchestrator.deploy.recommend import Candidate, mean_interval, recommend
from orchestrator.deploy.repeated import recommend_repeated
from orchestrator.record import BestPoint, RowScores, SweepPaths, TestScore, TrialResult, read_sweep, write_record
from orchestrator.report.best import _on_test_rows, _over_seeds

ROWS = 60
MakeSweep = Callable[..., SweepPaths]


@pytest.fixture
def pattern(tmp_path: Path, make_sweep: MakeSweep) -> TrialResult:
    (trial,) = read_sweep(make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)}).root).trials()
    return trial


def candidate(pattern: TrialResult, name: str, losses: list[float], size: int) -> Candidate:
    scores = RowScores(losses=losses, hits=[5] * ROWS, tokens=[10] * ROWS)
    best = BestPoint(value=scores.loss, step=7, values={"eval/loss": scores.loss}, adapter="adapters/step-7")
    applied = {"num_trainable_parameters": size}
    return Candidate(pattern.model_copy(update={"trial_id": name, "best": best, "applied": applied}), scores)


def runs_of(pattern: TrialResult, levels: dict[str, list[float]]) -> tuple[list[Candidate], dict[str, list[Candidate]]]:
    """Return trials with a level of loss for each seed. Rows differ much from each other, and equally in all runs."""
    rng = random.Random(0)
    rows = [10 + rng.uniform(-5, 5) for _ in range(ROWS)]
    runs = {
        name: [candidate(pattern, name, [10 * level + row for row in rows], 100 - i) for level in seeds]
        for i, (name, seeds) in enumerate(levels.items())
    }
    return [each[0] for each in runs.values()], runs


def test_seeds_hold_a_lead_that_the_rows_alone_would_show(pattern: TrialResult) -> None:
    """On the rows of one seed, a leads by 0.02 everywhere; seeds of each differ by 0.1."""
    finalists, runs = runs_of(pattern, {"a": [1.0, 1.1, 1.05], "b": [1.02, 1.0, 1.1]})
    assert recommend(finalists, "eval/loss", "min").tied == []
    found = recommend_repeated(finalists, runs, "eval/loss", "min", strict=False, num_compared=9)
    assert found.leader.trial.trial_id == "b", "its mean over seeds is the best"
    (rival,) = found.tied
    assert rival.candidate.trial.trial_id == "a"
    assert rival.difference == pytest.approx(0.01)
    assert rival.low < -0.05 < 0.1 < rival.high
    assert found.recommended.trial.trial_id == "b", "it is the smaller one of the two"
    assert found.num_compared == 9


def test_a_lead_larger_than_the_noise_of_seeds_stays(pattern: TrialResult) -> None:
    finalists, runs = runs_of(pattern, {"a": [1.0, 1.001, 1.002], "b": [1.2, 1.201, 1.203]})
    found = recommend_repeated(finalists, runs, "eval/loss", "min", strict=False, num_compared=2)
    assert found.tied == []
    (rival,) = found.rivals
    assert rival.difference == pytest.approx(0.2, abs=0.001)
    assert 0.19 < rival.low < rival.high < 0.21
    assert found.recommended.trial.trial_id == "a"


def test_the_interval_holds_the_true_difference_as_often_as_it_says(pattern: TrialResult) -> None:
    """300 pairs with equal true means, three seeds each: some 95% of the intervals contain zero."""
    rng, held = random.Random(1), 0
    for _ in range(300):
        levels = {name: [1 + rng.gauss(0, 0.02) for _ in range(3)] for name in "ab"}
        finalists, runs = runs_of(pattern, levels)
        found = recommend_repeated(finalists, runs, "eval/loss", "min", strict=False, num_compared=2)
        held += found.rivals[0].is_tied
    assert 0.91 <= held / 300 <= 0.98


def test_strict_takes_the_best_mean(pattern: TrialResult) -> None:
    finalists, runs = runs_of(pattern, {"small": [1.01, 1.1, 1.05], "smaller": [1.0, 1.12, 1.06]})
    strict = recommend_repeated(finalists, runs, "eval/loss", "min", strict=True, num_compared=2)
    assert strict.recommended.trial.trial_id == "small"
    loose = recommend_repeated(finalists, runs, "eval/loss", "min", strict=False, num_compared=2)
    assert loose.recommended.trial.trial_id == "smaller"


def test_seeds_are_told(pattern: TrialResult) -> None:
    finalists, runs = runs_of(pattern, {"a": [1.0, 1.2], "b": [1.5, 1.6]})
    found = recommend_repeated(finalists, runs, "eval/loss", "min", strict=False, num_compared=2)
    first, second = _over_seeds(found)
    means = [fmean(values) for values in found.over_seeds.values()]
    assert first.startswith(f"over 2 seeds: a, mean {means[0]:.6g} (")
    assert second.startswith(f"over 2 seeds: b, mean {means[1]:.6g} (")
    assert "+0.45 (" in second
    assert found.as_dict()["over_seeds"] == found.over_seeds


def test_the_winner_on_test_rows_is_told_with_its_interval_and_what_selection_added() -> None:
    scores = RowScores(losses=[1.0, 3.0] * 50, hits=[1] * 100, tokens=[2] * 100)
    test = TestScore(trial_id="a", step=7, scores=scores, held_out={"eval/loss": 0.9})
    low, high = mean_interval(scores)
    assert (low, high) == pytest.approx((1 - 1.96 * 0.05, 1 + 1.96 * 0.05), abs=0.01)
    first, second = _on_test_rows(test)
    assert first.startswith("on 100 test rows, which no decision has seen: a, loss 1 (95%: 0.9")
    assert second == "  on the held-out rows it has loss 0.9: the test rows add +0.1"


def test_a_score_of_another_winner_is_not_shown(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "t", {"a": ("COMPLETE", 0.5), "b": ("COMPLETE", 0.4)})
    record = read_sweep(paths.root)
    scores = RowScores(losses=[1.0], hits=[1], tokens=[2])
    chosen = [
        ChosenTrial(record, trial, paths.root, recommend([Candidate(trial, None)], "eval/loss", "min"), {}, {})
        for trial in record.trials()
    ]
    assert [each.test_score for each in chosen] == [None, None]
    write_record(paths.test, TestScore(trial_id="b", step=7, scores=scores, held_out={"eval/loss": 0.4}))
    assert [each.test_score and each.test_score.trial_id for each in chosen] == ["b", None]
