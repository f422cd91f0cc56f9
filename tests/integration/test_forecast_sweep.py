"""The forecast in a real sweep: it stops trials, keeps the winner, and its decisions follow from the records."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from searched import by_age, decided, losses, sweep

from orchestrator.record import TrialState
from orchestrator.sweep.schedulers.forecast_rule import ForecastRule

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

STEPS, EVERY = 40, 4
RATES = [1e-5, 5e-3, 1e-4, 2e-5]
SETTINGS = [
    f"search={{algorithm: grid, space: {{training.learning_rate: {{grid: {RATES}}}}}}}", f"training.steps={STEPS}",
    f"training.eval_steps={EVERY}", "training.schedule=cosine", "resources.trials_per_gpu=4",
]  # fmt: skip


def test_slow_trials_stop_the_winner_is_kept_and_decisions_follow_from_the_records(tmp_path: Path) -> None:
    whole = sweep(tmp_path / "whole", *SETTINGS, "scheduler={kind: none}")
    said: list[str] = []
    record = sweep(tmp_path / "stopped", *SETTINGS, "scheduler={kind: forecast}", say=said.append)
    best = min(whole.trials(), key=lambda trial: trial.best.value)  # type: ignore[union-attr]
    kept = min(record.trials(), key=lambda trial: trial.best.value)  # type: ignore[union-attr]
    assert kept.config.training.learning_rate == best.config.training.learning_rate
    assert kept.best.value == best.best.value  # type: ignore[union-attr]
    assert kept.state == TrialState.COMPLETE
    assert "forecasts of trials that ran to their end held the loss in their 95% interval" in said[-1]
    stops = {each.trial_id: each for each in decided(record, "stopped")}
    assert len(stops) >= 2
    assert sum(trial.step for trial in record.trials()) < sum(trial.step for trial in whole.trials())

    trials, rule = by_age(record), ForecastRule(record.info.spec, record.info.num_rows)
    curves = {trial.trial_id: losses(record, trial) for trial in trials}
    for step in range(EVERY, STEPS, EVERY):  # all trials of the pack start together
        reports = [
            (
                SimpleNamespace(trial_id=t.trial_id, config=t.config.varied),
                {"step": step, "eval/loss": curves[t.trial_id][step]},
            )
            for t in trials
            if step in curves[t.trial_id]
        ]
        expected = {name: each.why for name, each in stops.items() if each.step == step}
        assert rule.judge(reports) == expected
