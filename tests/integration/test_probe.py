"""`plan --probe` trains a few steps by the code that trains trials."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.embedded import EXPERIMENT as DEMO

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["fast", "trl"])
def test_a_probe_measures_steps_and_leaves_nothing(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fixed = [f"training.engine={engine}", "lora.rank=4"]
    options = [word for each in fixed for word in ("--set", each)]
    done = CliRunner().invoke(app, ["plan", str(DEMO), *options, "--probe", "--json"])
    assert done.exit_code == 0, done.exception
    plan = json.loads(capfd.readouterr().out)
    (corner,) = plan["corners"]
    measured = corner["measured"]
    assert measured["engine"] == engine
    assert measured["step_s"] > 0
    assert measured["peak_gib"] is None or measured["peak_gib"] > 0
    tokens_a_step = measured["tokens_per_second"] * measured["step_s"]
    assert tokens_a_step == pytest.approx(8 * 36, rel=0.2), "8 rows of some 36 tokens"
    assert plan["whole"]["train_s"] > 0
    assert list(tmp_path.iterdir()) == []
