"""The replay of stopping rules on a table of whole curves."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import stopping

STEPS, EVERY, NUM = 200, 10, 24


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write a table of curves whose loss falls with the rate."""
    draw, trials = np.random.default_rng(0), []
    for _ in range(NUM):
        rate = float(10 ** draw.uniform(-4.3, -2.5))
        at = np.arange(EVERY, STEPS + 1, EVERY)
        left = 0.5 * (1 + np.cos(np.pi * at / STEPS))
        logs = -0.5 + 0.1 * np.log10(rate / 1e-3) ** 2 + 0.3 * (at * rate / 0.02) ** -0.3 + 60 * rate * left
        evaluations = [[int(step), int(step) * 100, float(np.exp(log))] for step, log in zip(at, logs, strict=True)]
        config = {
            "training.learning_rate": rate,
            "training.schedule": "cosine",
            "training.batch_size": 8,
            "lora.rank": 8,
        }
        trials.append({"config": config, "evaluations": evaluations})
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"steps": STEPS, "eval_steps": EVERY, "trials": trials}))
    return path


def tally(curves: list[stopping.Curve], rule: str, draws: int = 20, size: int = 12) -> stopping.Tally:
    found, draw = stopping.Tally(), np.random.default_rng(1)
    for _ in range(draws):
        chosen = [curves[i] for i in draw.permutation(len(curves))[:size]]
        stopping.replay(chosen, stopping.RULES[rule](), found)
    return found


def test_the_forecast_keeps_the_best_where_asha_stops_it(table: Path) -> None:
    curves = stopping.curves_of(json.loads(table.read_text()))
    ahead, asha = tally(curves, "forecast"), tally(curves, "asha 3")
    assert np.mean(ahead.was_stopped) <= 0.1
    assert np.mean(ahead.was_stopped) < np.mean(asha.was_stopped)
    assert np.mean(ahead.tokens) < 0.7
    assert max(ahead.regret) < 0.01


def test_a_rule_that_stops_none_spends_all_and_loses_nothing(table: Path) -> None:
    curves, found = stopping.curves_of(json.loads(table.read_text())), stopping.Tally()
    stopping.replay(curves[:20], stopping.never, found)
    assert found.tokens == [1.0]
    assert found.regret == [0.0]
    assert found.was_stopped == [False]


def test_fewer_trials_stay_within_their_tokens(table: Path) -> None:
    curves, found = stopping.curves_of(json.loads(table.read_text())), stopping.Tally()
    stopping.replay(curves[:20], stopping.never, found, allowed=0.52)
    assert found.tokens == [0.5]


def test_a_freed_slot_takes_the_next_trial_at_once(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "NUM_SLOTS", 2)
    curves, most, found = stopping.curves_of(json.loads(table.read_text()))[:5], [], stopping.Tally()

    def rule(sweep: stopping.Sweep, reporting: list[str]) -> set[str]:
        most.append(len(reporting))
        return {name for name in reporting if name != "t0" and sweep.seen[name] == 3}

    stopping.replay(curves, rule, found)
    assert most == [2] * 12 + [1] * 7
    assert found.tokens == [pytest.approx((20 + 4 * 3) / 100)]
    assert found.was_stopped != [min(curves, key=lambda curve: curve.losses.min()).name == "t0"]


def test_the_command_prints_a_line_for_each_rule(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stopping", str(table), "--sizes", "6,64", "--draws", "3"])
    stopping.main()
    shown = capsys.readouterr().out
    for rule in stopping.RULES:
        assert f"| 6 | {rule} | 0." in shown
    assert "| 6 | fewer trials, 0." in shown
    assert "(the table has 24 trials: no sweep of 64)" in shown
    assert "95% intervals of the forecast held: " in shown
