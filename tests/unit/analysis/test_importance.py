"""Importances find a planted effect, with an interval that holds it, and claim nothing where there is none."""

import math
from pathlib import Path

import numpy as np
import pytest
from planted import plant

from orchestrator.analysis.importance import MIN_TRIALS, Importances, find_importances
from orchestrator.analysis.outcomes import find_outcomes
from orchestrator.analysis.sweep_data import read_data
from orchestrator.page.fields import effects
from orchestrator.record import read_sweep


def importances(folder: Path) -> Importances:
    return find_importances(read_data(read_sweep(folder)))


def test_a_planted_effect_is_found_and_its_interval_holds_it(tmp_path: Path) -> None:
    found = importances(plant(tmp_path / "s", 24, effect=1.0).root)
    first = found.fields[0]
    assert first.field == "training.learning_rate"
    assert first.matters
    assert first.share > 0.5
    assert first.share_low < first.share < first.share_high + 1e-9
    places = [math.log(each.trial.config.varied["training.learning_rate"] / 1e-4) / math.log(100)
              for each in found.outcomes.known]  # fmt: skip
    planted = -(max(places) - min(places))  # the leader is near the highest rate
    assert first.effect.low < planted < first.effect.high < 0
    assert [each.matters for each in found.fields[1:]] == [False, False]


def test_without_an_effect_nothing_is_claimed(tmp_path: Path) -> None:
    claims = [
        each.matters
        for seed in range(6)
        for each in importances(plant(tmp_path / str(seed), 24, effect=0.0, seed=seed).root).fields
    ]
    assert len(claims) == 18
    assert sum(claims) <= 1


def test_a_stopped_trial_counts_with_its_forecast_loss(tmp_path: Path) -> None:
    whole = read_data(read_sweep(plant(tmp_path / "whole", 24, stops=False).root))
    early = read_data(read_sweep(plant(tmp_path / "early", 24, stops=True).root))
    outcomes = {each.trial.trial_id: each for each in find_outcomes(early).known}
    forecast = [each for each in outcomes.values() if each.is_forecast]
    assert len(forecast) == 8
    assert all(each.log_sd > 0 for each in forecast)
    final = {each.trial.trial_id: each.value for each in find_outcomes(whole).known}
    errors = []
    for each in forecast:
        best = each.trial.best
        assert best is not None
        error = math.log(each.value / final[each.trial.trial_id])
        assert abs(error) < 4 * each.log_sd
        errors.append((abs(error), abs(math.log(best.value / final[each.trial.trial_id]))))
    assert sum(error for error, _ in errors) < 0.5 * sum(before for _, before in errors)


def test_diverged_trials_count_as_the_worst_in_the_shares(tmp_path: Path) -> None:
    found = importances(plant(tmp_path / "s", 24, failed=3).root)
    assert len(found.outcomes.diverged) == 3
    assert len(found.outcomes.known) == 21
    assert np.isclose(sum(each.share for each in found.fields), 1.0)


def test_few_trials_and_no_fields_say_why(tmp_path: Path) -> None:
    few = importances(plant(tmp_path / "few", MIN_TRIALS - 1, stops=False).root)
    assert few.fields == []
    assert "5 of the trials have a value, and at least 6 are needed" in few.why_none
    none = importances(plant(tmp_path / "none", 1, stops=False, space={}, algorithm="auto", num_trials=1).root)
    assert none.why_none == "no field was searched"


def test_a_forecast_is_no_less_sure_than_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.analysis.outcomes.widening", lambda *_: 1e5)
    data = read_data(read_sweep(plant(tmp_path / "s", 12).root))
    outcomes = find_outcomes(data).known
    lowest = min(each.trial.best.value for each in outcomes if each.trial.best)
    forecast = [each for each in outcomes if each.is_forecast]
    assert len(forecast) == 4
    for each in forecast:
        assert each.trial.best is not None
        assert 0 < each.log_sd <= math.log(each.trial.best.value / lowest) / 2
    assert not isinstance(effects(data, find_importances(data)), str)
