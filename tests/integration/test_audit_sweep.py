"""An audit of a real sweep: interrupted, continued, read again; the sweep itself stays as it was."""

import json
import os
import signal
from pathlib import Path

import pytest
from searched import losses, sweep
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import Interrupted
from orchestrator.record import SweepRecord, TrialResult, TrialState, read_sweep
from orchestrator.sweep import finish_audit
from orchestrator.sweep.audit import begin_audit, stopped_trials

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

RATES = [5e-3, 1e-5, 2e-5, 1e-4]
SETTINGS = [
    f"search={{algorithm: grid, space: {{training.learning_rate: {{grid: {RATES}}}}}}}", "training.steps=40",
    "training.eval_steps=4", "training.schedule=cosine", "resources.trials_per_gpu=4", "scheduler={kind: forecast}",
]  # fmt: skip


def files_of(record: SweepRecord) -> dict[Path, bytes]:
    """Return the contents of all files of a sweep but its audits and its lock."""
    found = [
        path for path in record.paths.root.rglob("*") if path.is_file() and record.paths.audits not in path.parents
    ]
    return {path: path.read_bytes() for path in found if path.name not in (".driver.lock", "driver.log")}


def test_stopped_trials_run_to_their_end_beside_a_sweep_that_stays_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = sweep(tmp_path, *SETTINGS)
    stopped = {trial.trial_id: trial for trial in stopped_trials(record)}
    assert len(stopped) >= 2
    before = files_of(record)
    begun = begin_audit(record, 2, 0)

    signals = [signal.SIGINT]  # a second one would not wait for checkpoints

    def interrupt(trials: list[TrialResult]) -> None:
        if signals and any(trial.step for trial in trials):
            os.kill(os.getpid(), signals.pop())

    with pytest.raises(Interrupted):
        finish_audit(record, begun, interrupt)
    assert [trial.state for trial in begun.trials() if trial.state == TrialState.COMPLETE] == []

    arguments = ["audit", str(record.paths.root), "--trials", "2"]
    capfd.readouterr()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    said = capfd.readouterr().out
    ended = {trial.trial_id: trial for trial in read_sweep(begun.paths.root).trials()}
    assert {(trial.state, trial.step) for trial in ended.values()} == {(TrialState.COMPLETE, 40)}
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert {name: trial.seconds for name, trial in ended.items()} == {
        trial.trial_id: trial.seconds for trial in read_sweep(begun.paths.root).trials()
    }, "an audit that has ended is only shown"
    leader = record.trials()[0]
    assert leader.best is not None
    assert (shown["leader"], shown["best"]) == (leader.trial_id, leader.best.value)
    assert (shown["num_audited"], shown["num_stopped"]) == (2, len(stopped))
    for trial in shown["trials"]:
        again = ended[trial["audit_id"]]
        was = losses(record, stopped[trial["trial_id"]])
        now = losses(begun, again)
        assert {step: now[step] for step in was} == was, "the same bits up to the stop"
        assert trial["difference"] == 0
        assert trial["value"] == min(now.values())
        assert trial["would_have_won"] == (trial["value"] < leader.best.value)
    assert shown["num_won"] == sum(trial["would_have_won"] for trial in shown["trials"])
    whole = sum(stopped[name].tokens * 40 / stopped[name].step for name in stopped)
    saved = whole - sum(
        stopped[name].tokens / stopped[name].step * (stopped[name].step + stopped[name].extra_steps) for name in stopped
    )
    assert shown["saving"]["tokens"] == pytest.approx(saved, abs=1)
    assert "stopped trials would have won" in said
    assert f"stopping saved about {shown['saving']['tokens']:,} tokens" in said
    assert files_of(record) == before
