"""Trials' warnings in the live view and in `status`."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cli.look import status
from orchestrator.record import SweepPaths, TrialResult, read_sweep, write_record
from orchestrator.report.live import SweepView
from tests.unit.report.made_up import made_up_spec


@pytest.fixture
def trials(make_sweep: Callable[..., SweepPaths], tmp_path: Path) -> list[TrialResult]:
    record = read_sweep(make_sweep(tmp_path / "s", {"t_1": ("COMPLETE", 0.5), "t_2": ("COMPLETE", 0.7)}).root)
    warned = []
    for trial in record.trials():
        warnings = [f"W&B failed: no status of run {trial.trial_id}", "MLflow failed: [gone]"]
        warned.append(trial.model_copy(update={"warnings": warnings}))
        write_record(record.paths.trial(trial.trial_id).result, warned[-1])
    return warned


def test_a_warning_of_many_trials_is_printed_once_in_the_live_view(trials: list[TrialResult]) -> None:
    shown = StringIO()
    view = SweepView(Console(file=shown, width=80), made_up_spec(), lambda: 2, "a sweep")
    view.update(trials[:1])
    view.update(trials)
    printed = [line[len("19:30:00 ") :] for line in shown.getvalue().splitlines() if " warning: " in line]
    assert printed == ["warning: W&B failed: no status of run t_1", "warning: MLflow failed: [gone]"]


@pytest.mark.usefixtures("trials")
def test_status_prints_how_many_trials_have_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(str(tmp_path / "s"), output="runs")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning ")]
    assert printed == [
        "warning (2 trials): W&B failed: no status of run t_1",
        "warning (2 trials): MLflow failed: [gone]",
    ]
