"""What `check` prints is an experiment again."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.spec import load_spec


@pytest.mark.parametrize(
    "overrides",
    [
        ["search.num_trials=4"],
        ["search.algorithm=grid", "search.num_trials=null", "search.space={lora.rank: {grid: [4, 8]}}"],
    ],
)
def test_what_is_printed_is_accepted_and_says_the_same(overrides: list[str], tmp_path: Path) -> None:
    options = [word for each in overrides for word in ("--set", each)]
    printed = CliRunner().invoke(app, ["check", "experiments/demo.yaml", *options])
    assert printed.exit_code == 0, printed.output
    again = tmp_path / "again.yaml"
    again.write_text(printed.stdout)
    assert load_spec(again, []).search.total_trials == load_spec("experiments/demo.yaml", overrides).search.total_trials
