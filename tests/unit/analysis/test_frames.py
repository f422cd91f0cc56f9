"""The frames of a sweep, from Python and as files."""

from pathlib import Path

import pandas
import pytest
from planted import plant

from orchestrator import open_sweep
from orchestrator.analysis.sweep_data import read_data
from orchestrator.errors import RequestError
from orchestrator.page.figures import FIGURES
from orchestrator.page.report import write_report
from orchestrator.record import read_sweep


def test_the_frames_hold_the_records(tmp_path: Path) -> None:
    sweep = open_sweep(plant(tmp_path / "s", 9).root)
    trials, curves, decisions = sweep.trials(), sweep.curves(), sweep.decisions()
    assert list(trials["trial"]) == [trial.trial_id for trial in sweep.record.trials()]
    assert trials["value"].is_monotonic_increasing
    assert set(trials["state"]) == {"COMPLETE", "STOPPED"}
    assert (trials["outcome"] <= trials["value"] + 1e-12).all()
    assert set(trials.loc[trials["is_forecast"], "state"]) == {"STOPPED"}
    assert trials["lora.rank"].isin([4, 8, 16, 32]).all()
    assert str(trials["started"].dtype).startswith("datetime64")
    assert len(curves) == 6 * 10 + 3 * 3
    first = curves.iloc[0]
    assert (first["step"], first["tokens"], first["seconds"], first["gpu_seconds"]) == (20, 2000, 2.0, 1.0)
    assert list(decisions.columns) == ["trial", "step", "action", "why", "donor"]
    assert list(decisions["action"]) == ["stopped"] * 3
    assert decisions["why"].str.startswith("forecast: too slow").all()
    importances = sweep.importances()
    assert set(importances["field"]) == {"training.learning_rate", "lora.rank", "lora.dropout"}
    assert importances["importance"].sum() == pytest.approx(1)


def test_every_figure_is_drawn_by_its_name(tmp_path: Path) -> None:
    sweep = open_sweep(plant(tmp_path / "s", 9).root)
    for figure in FIGURES:
        drawn = sweep.figure(figure.name)
        assert len(drawn.data) >= 1
        assert drawn.layout.title.text == figure.title
    with pytest.raises(RequestError, match="figure 'pie': is unknown; choose from curves, rungs"):
        sweep.figure("pie")
    empty = open_sweep(plant(tmp_path / "empty", 0).root)
    with pytest.raises(RequestError, match="figure curves: there is nothing to draw: no trial has an evaluation"):
        empty.figure("curves")


def test_an_empty_sweep_has_frames_with_columns_and_says_why(tmp_path: Path) -> None:
    sweep = open_sweep(plant(tmp_path / "s", 0).root)
    assert len(sweep.trials()) == len(sweep.curves()) == len(sweep.decisions()) == len(sweep.importances()) == 0
    assert "value" in sweep.trials()
    assert sweep.importances().attrs["why_none"] == "0 of the trials have a value, and at least 6 are needed"


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_tables_are_saved_also_with_values_of_several_types(tmp_path: Path, format: str) -> None:
    space = {
        "lora.layers_to_transform": {"choice": [None, [0], [0, 1]]},
        "training.optimizer": {"choice": ["adamw_torch", "sgd", "rmsprop"]},
    }
    paths = plant(tmp_path / "s", 8, space=space)
    files = write_report([read_data(read_sweep(paths.root))], tmp_path / "tables", format)  # type: ignore[arg-type]
    assert [file.name for file in files] == [
        f"{name}.{format}" for name in ("trials", "curves", "decisions", "importances")
    ]
    trials = pandas.read_csv(files[0]) if format == "csv" else pandas.read_parquet(files[0])
    assert set(trials["lora.layers_to_transform"].dropna()) <= {"[0]", "[0, 1]"}
    assert set(trials["training.optimizer"]) <= {"adamw_torch", "sgd", "rmsprop"}
    assert len(trials) == 8
