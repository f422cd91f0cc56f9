"""A sweep that ends itself: what it says, what it records, and how it continues with more trials."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from searched import ONE_AT_A_TIME, RATE, sweep
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.deploy import FinishedSweep
from orchestrator.record import TrialState, read_sweep
from orchestrator.record.extend import extend_sweep
from orchestrator.report.live import SweepView
from orchestrator.sweep import resume_sweep
from orchestrator.sweep.schedulers import report_order

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]


def test_a_sweep_ends_itself_and_more_trials_lift_its_rule(tmp_path: Path) -> None:
    """After the first of the rates, which are tried in this order, there is nothing to gain."""
    first = ", ".join(f"{{training.learning_rate: {rate}}}" for rate in (1e-3, 2e-5, 1.5e-5, 1.2e-5))
    rule = ["search.num_trials=12", f"search.first=[{first}]", "search.stop={unmoved: 3, min_trials: 2}"]
    said: list[str] = []
    record = sweep(tmp_path, RATE, "search.algorithm=random", *rule, *ONE_AT_A_TIME, say=said.append)
    ended, trials = record.search_ended(), record.trials()
    assert ended is not None
    assert [trial.state in (TrialState.COMPLETE, TrialState.STOPPED) for trial in trials] == [True] * 4
    assert (ended.rule, ended.num_ended, ended.leader) == ("unmoved", 4, trials[0].trial_id)
    assert trials[0].config.training.learning_rate == 1e-3
    assert str(ended) in said, "while it runs"
    assert f"{ended}: 4 of 12 trials begun" in said, "at its end"
    assert FinishedSweep(record).best().trial.trial_id == ended.leader
    status = CliRunner().invoke(app, ["status", str(record.paths.root)]).output
    assert str(ended) in status
    assert "4 of 12 started" in status
    shown = json.loads(CliRunner().invoke(app, ["status", str(record.paths.root), "--json"]).output)
    assert shown["search_ended"] == ended.model_dump(mode="json")

    began = {trial.trial_id: trial.seconds for trial in trials}
    resumed = resume_sweep(read_sweep(record.paths.root), lambda _: None)
    assert {trial.trial_id: trial.seconds for trial in resumed.trials()} == began, "a resume decides the same"

    console, has_ended = Console(file=io.StringIO()), record.paths.search_ended.is_file
    with SweepView(console, record.info.spec, lambda: 6, "more", has_ended) as view:
        more = resume_sweep(extend_sweep(read_sweep(record.paths.root), 6, []), view.update, say=view.say)
        assert view._summary()[0].startswith("6 of 6 trials ended")
    assert len(more.trials()) == 6
    assert more.search_ended() is None
    assert [change.field for change in read_sweep(record.paths.root).info.changes] == [
        "search.num_trials",
        "search.stop.unmoved",
    ]


def test_trials_that_run_end_as_their_scheduler_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots; nobody expects to halve the loss once more. No report waits for a trial that will not come."""
    monkeypatch.setattr(report_order, "MIN_PATIENCE_S", 10_000.0)
    rule = ["search.num_trials=30", "search.stop={gain: 50%, min_trials: 4}"]
    record = sweep(tmp_path, RATE, "search.algorithm=auto", *rule, "scheduler={kind: median, grace_steps: 2}")
    ended, trials = record.search_ended(), record.trials()
    assert ended is not None
    assert (ended.rule, ended.share) == ("gain", 0.5)
    assert ended.num_ended >= 4
    assert ended.num_ended <= len(trials) <= ended.num_ended + 3
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.STOPPED}
    assert all(trial.step == 8 for trial in trials if trial.state == TrialState.COMPLETE)
