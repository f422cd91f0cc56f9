"""The exit code of a sweep's commands says whether trials failed."""

import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main

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
        assert errors.startswith("error: 1 of 2 trials failed; the best adapter is one of the others'\n")
