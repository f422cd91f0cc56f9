"""What is valid but probably not meant is said, by `check` too."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.planning.doubts import doubts_of
from tests.unit.planning.conftest import MakeSpec

SPACE = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}


def search(**fields: Any) -> dict[str, Any]:
    return {"algorithm": "random", "num_trials": 8, "space": SPACE} | fields


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"search": search(algorithm="optuna")}, "its first 10 trials are drawn at random, and there are 8 in all"),
        ({"search": search(), "lora": {"rank": 96}}, "lora.rank 96: base embedded is 192 features wide"),
        ({"scheduler": {"kind": "median"}}, "scheduler.kind median: there is one trial, and no other to compare"),
        ({"data": {"source": "/nowhere/rows.jsonl"}}, "data.source /nowhere/rows.jsonl: there is no such file"),
        ({"base": {"model": "/nowhere/base"}}, "base.model /nowhere/base: there is no model in this folder"),
    ],
    ids=["random start", "rank", "one trial", "rows", "base"],
)
def test_each_doubt(make_spec: MakeSpec, sections: dict[str, Any], said: str) -> None:
    found = doubts_of(make_spec(**sections))
    assert len(found) == 1
    assert said in found[0]


def test_a_sound_experiment_raises_no_doubt(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    sound = make_spec(
        search=search(algorithm="optuna", num_trials=20),
        lora={"rank": 64},
        data={"source": str(tmp_path / "rows.jsonl")},
        scheduler={"kind": "median"},
    )
    assert doubts_of(sound) == []
    assert doubts_of(make_spec(data={"source": str(tmp_path / "*.jsonl")})) == []


def test_check_says_it_too() -> None:
    printed = CliRunner().invoke(app, ["check", str(DEMO), "--set", "lora.rank=128", "--set", "search.space={}"])
    assert "# note: lora.rank 128: base embedded is 192 features wide" in printed.stdout, printed.output
