"""Output of `resume`: a note on a changed experiment file at the start, an exit code for failed trials at the end."""

import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.cli.train import _require_no_failures
from orchestrator.errors import TrialsFailedError
from orchestrator.record import read_sweep, write_record
from orchestrator.record.new_sweep import source_of
from orchestrator.spec import load_spec

MakeSweep = Any


@pytest.mark.parametrize(("states", "code"), [({"a": "COMPLETE"}, 0), ({"a": "COMPLETE", "b": "FAILED"}, 3)])
def test_a_sweep_with_failed_trials_ends_with_3(
    states: dict[str, str],
    code: int,
    tmp_path: Path,
    make_sweep: MakeSweep,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    trials = {name: (state, 0.5 if state == "COMPLETE" else None) for name, state in states.items()}
    paths = make_sweep(tmp_path / "s", trials)
    monkeypatch.setattr("orchestrator.sweep.resume_sweep", lambda *_: None, raising=False)
    monkeypatch.setattr("orchestrator.cli.train.show_best", lambda console, _: console.print("the best"))
    monkeypatch.setattr(sys, "argv", ["orchestrator", "resume", str(paths.root)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    printed, errors = capfd.readouterr()
    assert "the best" in printed
    if code:
        assert "1 of 2 trials failed:\n  b FAILED at step 0" in printed
        assert errors.startswith("error: 1 of 2 trials failed; the best adapter comes from the others\n")


def test_a_finalist_that_fails_when_it_runs_again_counts_too(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)})
    make_sweep(paths.repeats, {"b": ("COMPLETE", 0.5), "c": ("FAILED", None)})
    with pytest.raises(TrialsFailedError, match="1 of 3 trials failed"):
        _require_no_failures(read_sweep(paths.root))


def test_resume_prints_how_the_experiment_file_has_changed(
    tmp_path: Path, make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "base: {model: embedded}\ntraining: {steps: 300}\n"
        "data: {source: embedded, format: template, template: '{question} {answer}'}\n"
    )
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)})
    info = read_sweep(paths.root).info
    spec = load_spec(file, ["training.steps=200"])
    write_record(paths.sweep, info.model_copy(update={"spec": spec, "source": source_of(file, [])}))
    monkeypatch.setattr("orchestrator.sweep.resume_sweep", lambda *_: None, raising=False)
    monkeypatch.setattr("orchestrator.cli.train.show_best", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["orchestrator", "resume", str(paths.root)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed, _ = capfd.readouterr()
    assert printed.startswith(
        f"note: {file} has changed since the start; the sweep continues as recorded:\n"
        "  training.steps: 200 recorded, 300 in the file\n"
        "  (--trials N and --budget LIMIT=V change a sweep; for anything else start a new one)\n"
    )
