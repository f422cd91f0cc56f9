"""The notebook of experiments/ runs from its first cell to its last, on any sweep."""

import os
from pathlib import Path

import pytest
from planted import plant

pytestmark = pytest.mark.slow

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra dev)")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra dev)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra dev)")

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "analysis.ipynb"


def test_every_cell_runs_and_shows_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP", str(plant(tmp_path / "s", 9).root))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [
        output
        for cell in code[1:]
        for output in cell.outputs
        if output.output_type in ("execute_result", "display_data")
    ]
    assert len(shown) >= len(code) - 1
    assert sum("application/vnd.plotly.v1+json" in output.data for output in shown) == 2
    assert (tmp_path / "trials.csv").is_file()
