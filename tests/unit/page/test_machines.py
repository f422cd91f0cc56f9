"""Figures of the machines: the runs of finalists with other seeds are in the timeline."""

from pathlib import Path

from planted import plant, plant_repeats

from orchestrator.analysis.importance import find_importances
from orchestrator.analysis.sweep_data import read_data
from orchestrator.page.figures import draw
from orchestrator.record import read_sweep


def test_repeats_are_hatched_bars_of_the_timeline(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 4, stops=False)
    data = read_data(read_sweep(paths.root))
    alone = draw("timeline", data, find_importances(data)).data
    assert [(trace.name, len(trace.x), trace.marker.pattern.shape) for trace in alone] == [("COMPLETE", 4, "")]
    plant_repeats(paths, 4, "t000")
    data = read_data(read_sweep(paths.root))
    traces = {trace.name: trace for trace in draw("timeline", data, find_importances(data)).data}
    assert list(traces) == ["COMPLETE", "COMPLETE, repeat"]
    again = traces["COMPLETE, repeat"]
    assert again.marker.pattern.shape == "/"
    assert sorted(again.text) == ["t000", "t001", "t002", "t003"]
